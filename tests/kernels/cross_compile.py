"""Compile the kernels for cards that are not here, with the tiles they would get; print what each needs, as JSON.

`python cross_compile.py clear bf16 sm86:128 gfx942:64`: a name of CONFIGURATIONS, dtype, then architecture:head size.
Needs Triton, no GPU. Not under the interpreter, so the tests run it as a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import triton
from hopper_hazards import hazards
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linearize.kernels import tile_for
from linearize.kernels.clear_backward import clear_dk_dv_kernel, clear_dq_kernel
from linearize.kernels.clear_forward import clear_forward_kernel
from linearize.kernels.foveated_backward import foveated_dk_dv_kernel, foveated_dq_kernel, foveated_means_kernel
from linearize.kernels.foveated_forward import foveated_forward_kernel
from linearize.kernels.mapped_backward import mapped_dk_dv_kernel, mapped_dq_kernel, mapped_dx_kernel
from linearize.kernels.mapped_forward import mapped_forward_kernel
from linearize.kernels.state_forward import state_kernel
from linearize.kernels.tuning import FOVEATED_KERNELS, KERNELS, MAPPED_KERNELS, feature_stages, of_rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MAPPED = (mapped_forward_kernel, mapped_dx_kernel, mapped_dq_kernel, mapped_dk_dv_kernel, state_kernel)
FOVEATED = (foveated_forward_kernel, foveated_dq_kernel, foveated_dk_dv_kernel, foveated_means_kernel)
_FOVEATED = dict(zip(FOVEATED_KERNELS, FOVEATED, strict=True))
_MAPPED = dict(zip(MAPPED_KERNELS, MAPPED, strict=True))


@dataclass(frozen=True)
class Configuration:
    """What some kernels are compiled for.

    Args:
        kernels: by name.
        feature_map: MAP of the kernels.
        has_exact: whether exact keys were attended to before.
        is_weighted: whether a state is weighted, as in the backward pass.
        fuses: whether numbers come in the model's own dtype, and the kernel applies the map.
        rows: most tokens that a program owns.
    """

    kernels: dict
    feature_map: str = "given"
    has_exact: bool = False
    is_weighted: bool = True
    fuses: bool = False
    rows: int = 256


CONFIGURATIONS = {
    "clear": Configuration(
        dict(zip(KERNELS, (clear_forward_kernel, clear_dq_kernel, clear_dk_dv_kernel), strict=True))
    ),
    "foveated": Configuration(_FOVEATED),
    "small": Configuration({name: _FOVEATED[name] for name in FOVEATED_KERNELS[:3]}, rows=16),  # tiles of 16 queries
    "mapped": Configuration(_MAPPED),
    "raw": Configuration(_MAPPED, "elu1"),  # on the raw scale
    "logs": Configuration(_MAPPED, "logs"),
    "fused": Configuration(_MAPPED, "elu1", fuses=True),
    "relu": Configuration(_MAPPED, "relu", fuses=True),
    "exact": Configuration({"mapped_forward": mapped_forward_kernel}, has_exact=True),
    "unweighted": Configuration({"state": state_kernel}, is_weighted=False),
    "unweighted raw": Configuration({"state": state_kernel}, "elu1", is_weighted=False, fuses=True),
}
STATISTICS = ("lse", "delta", "den", "pull", "norm", "centre", "log2_z", "total", "bias", "dbias")
# features come in float32, as maps give them, but where a kernel makes them of the model's own numbers
TYPES = {**dict.fromkeys((*STATISTICS, "x", "dx"), "*fp32"), "scale": "fp32", "share": "i32"}
TABLES = ("blocks", "rows", "columns", "masks", "heads", "top_key",
          "query_tokens", "key_tokens", "cell_ids", "mean_ids", "tile_ids", "hidden")  # fmt: skip
FIELDS = ("cell_fields", "mean_fields", "tile_fields", "words")
NUM_FEATURES = 256


def signature_of(kernel, dtype, constants, fuses=False):
    types, values, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name], values[(number,)] = "constexpr", constants[name]
            continue
        counted = "i64" if parameter.annotation_type == "i64" else "i32" if name.startswith("num_") else f"*{dtype}"
        known = None if fuses and name in ("x", "dx") else TYPES.get(name)
        types[name] = known or ("*i32" if name in TABLES else "*i64" if name in FIELDS else counted)
        if name == "state":
            types[name] = "*fp32" if dtype == "fp16" and constants["MAP"] == "given" else f"*{dtype}"
        if types[name].startswith("*") or types[name] == "i64":  # pointers and strides are multiples of 16
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, values, attributes)


def spilled_in_loops(code):
    """Return how many instructions between the target of a jump back and the jump touch a thread's stack."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", code)
    jumps = [(int(found[1], 16), int(at, 16)) for at, name, rest in lines
             if name.startswith("BRA") and (found := re.search(r"0x([0-9a-f]+)", rest))]  # fmt: skip
    spills = [int(at, 16) for at, name, _ in lines if name.startswith(("LDL", "STL"))]
    return sum(any(first <= at <= last for first, last in jumps if first < last) for at in spills)


def compile_for(name, kernel, target, size, dtype, configuration):
    feature_map, rows = configuration.feature_map, configuration.rows
    is_nvidia = target.startswith("sm")
    # 8.9 has the tiles of 8.6
    card = {"sm89": "sm86"}.get(target, target) if is_nvidia else "cdna" if target.startswith("gfx9") else "amd"
    tile = of_rows(tile_for(name, card, size), rows)
    constants = {
        "SIZE": size, "BLOCK_SIZE": max(16, 1 << (size - 1).bit_length()),
        "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "FEATURES": NUM_FEATURES,
        "BLOCK_FEATURES": 64 if (dtype, feature_map) == ("bf16", "given") else 32,
        "MAP": feature_map, "HAS_EXACT": configuration.has_exact, "PRECISION": "tf32" if is_nvidia else "ieee",
        "IS_WEIGHTED": configuration.is_weighted, "FEATURE_STAGES": feature_stages(card, tile),
    }  # fmt: skip
    gpu = (
        GPUTarget("cuda", int(target[2:]), 32)
        if is_nvidia
        else GPUTarget("hip", target, 64 if "gfx9" in target else 32)
    )
    options, start = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}, time.monotonic()
    made = triton.compile(signature_of(kernel, dtype, constants, configuration.fuses), target=gpu, options=options)
    found = {"kernel": name, "target": target, "size": size, "dtype": dtype, "tile": list(tile),
             "seconds": round(time.monotonic() - start, 1), "shared": made.metadata.shared}  # fmt: skip
    # of the loops that matter: those over features have fewer on Hopper
    only_features = configuration.has_exact or (name == "state" and feature_map == "given")
    found["stages"] = feature_stages(card, tile) if only_features else tile.num_stages
    if is_nvidia:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(made.asm["cubin"])
            usage, code = (
                subprocess.run(
                    [str(TOOLS / "cuobjdump"), option, str(binary)], capture_output=True, text=True, check=True
                )
                for option in ("--dump-resource-usage", "-sass")
            )
        found["registers"], found["stack"] = (
            int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK")
        )
        found["spilled_in_loops"] = spilled_in_loops(code.stdout)
        found["products"], found["waits"] = (code.stdout.count(name) for name in ("HGMMA", "WARPGROUP.DEPBAR"))
        found["async_copies"] = made.asm["ptx"].count("cp.async.cg")
        found["hazards"] = hazards(code.stdout)
    else:
        found["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"])[1])
    return found


def main():
    family, dtype, *targets = sys.argv[1:]
    configuration = CONFIGURATIONS[family]
    for name, kernel in configuration.kernels.items():
        for target, _, size in (each.partition(":") for each in targets):
            found = compile_for(name, kernel, target, int(size), dtype, configuration)
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
