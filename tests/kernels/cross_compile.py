"""Compile the kernels for cards that are not here, with the tiles they would get; print what each needs, as JSON.

`python cross_compile.py clear bf16 sm86:128 gfx942:64`: family (clear, mapped, or raw for the mapped kernels on the raw
scale), dtype, then architecture:head size.
Needs Triton, no GPU. Not under the interpreter, so the tests run it as a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linearize.kernels import tile_for
from linearize.kernels.clear_backward import clear_dk_dv_kernel, clear_dq_kernel
from linearize.kernels.clear_forward import clear_forward_kernel
from linearize.kernels.mapped_backward import mapped_dk_dv_kernel, mapped_dq_kernel, mapped_dx_kernel
from linearize.kernels.mapped_forward import mapped_forward_kernel
from linearize.kernels.state_forward import state_kernel
from linearize.kernels.tuning import KERNELS, MAPPED_KERNELS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MAPPED = (mapped_forward_kernel, mapped_dx_kernel, mapped_dq_kernel, mapped_dk_dv_kernel, state_kernel)
FAMILIES = {
    "clear": dict(zip(KERNELS, (clear_forward_kernel, clear_dq_kernel, clear_dk_dv_kernel), strict=True)),
    "mapped": dict(zip(MAPPED_KERNELS, MAPPED, strict=True)),
    "raw": dict(zip(MAPPED_KERNELS, MAPPED, strict=True)),
}
STATISTICS = ("lse", "delta", "den", "pull", "norm", "centre", "log2_z", "total")
# features come in float32, as maps give them: the larger of what can be
TYPES = {**dict.fromkeys((*STATISTICS, "x", "dx"), "*fp32"), "scale": "fp32", "share": "i32"}
TABLES = ("blocks", "rows", "columns", "masks", "heads", "top_key")
NUM_FEATURES = 256


def signature_of(kernel, dtype, constants):
    types, values, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name], values[(number,)] = "constexpr", constants[name]
            continue
        counted = "i64" if parameter.annotation_type == "i64" else "i32" if name.startswith("num_") else f"*{dtype}"
        types[name] = TYPES.get(name) or ("*i32" if name in TABLES else counted)
        if name == "state":
            types[name] = "*fp32" if dtype == "fp16" and constants["MAP"] == "given" else f"*{dtype}"
        if types[name].startswith("*") or types[name] == "i64":  # pointers and strides are multiples of 16
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, values, attributes)


def compile_for(name, kernel, target, size, dtype, feature_map):
    is_nvidia = target.startswith("sm")
    # 8.9 has the tiles of 8.6
    tile = tile_for(name, {"sm89": "sm86"}.get(target, target) if is_nvidia else "amd", size)
    constants = {"SIZE": size, "BLOCK_SIZE": max(16, 1 << (size - 1).bit_length()),
                 "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "FEATURES": NUM_FEATURES,
                 "BLOCK_FEATURES": 64 if (dtype, feature_map) == ("bf16", "given") else 32,
                 "MAP": feature_map, "HAS_EXACT": False,
                 "PRECISION": "tf32" if is_nvidia else "ieee", "IS_WEIGHTED": True}  # fmt: skip
    gpu = (
        GPUTarget("cuda", int(target[2:]), 32)
        if is_nvidia
        else GPUTarget("hip", target, 64 if "gfx9" in target else 32)
    )
    options, start = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}, time.monotonic()
    made = triton.compile(signature_of(kernel, dtype, constants), target=gpu, options=options)
    found = {"kernel": name, "target": target, "size": size, "dtype": dtype, "tile": list(tile),
             "seconds": round(time.monotonic() - start, 1), "shared": made.metadata.shared}  # fmt: skip
    if is_nvidia:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(made.asm["cubin"])
            command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(binary)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found["registers"], found["stack"] = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
        found["async_copies"] = made.asm["ptx"].count("cp.async.cg")
    return found


def main():
    family, dtype, *targets = sys.argv[1:]
    feature_map = "elu1" if family == "raw" else "given"
    for name, kernel in FAMILIES[family].items():
        for target, _, size in (each.partition(":") for each in targets):
            sys.stdout.write(json.dumps(compile_for(name, kernel, target, int(size), dtype, feature_map)) + "\n")


if __name__ == "__main__":
    main()
