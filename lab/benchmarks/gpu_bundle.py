"""Write what a machine with a GPU, but without ComfyUI and without a network, needs.

`python -m lab.benchmarks.gpu_bundle` in the root of the checkout, with the Python of `.venv`.

The machine has Python, PyTorch, Triton and pytest of its own. Copy the checkout there with `build/gpu_bundle`, and run
the commands of `gpu.md` in the checkout with `PYTHONPATH=build/gpu_bundle`. The bundle holds ComfyUI's model code
(Python files only), the two packages it imports that no such machine has, and the name `linearize` for the checkout.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from .. import ROOT
from ..comfyui import COMFYUI

BUNDLE = ROOT / "build" / "gpu_bundle"
MAX_BYTES = 8 * 2**20
PACKAGES = ("comfy_kitchen", "comfy_aimdo")  # imported by ComfyUI's model code
NATIVE = shutil.ignore_patterns("*.so*", "*.dll", "*.pyd", "__pycache__")  # built for this machine; there are fallbacks
CHECKOUT = '''"""The checkout under its own name."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
'''


def python_files_only(folder: str, names: list[str]) -> set[str]:
    """Return the names that are neither Python files nor folders, for `shutil.copytree`."""
    return {name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir()} | {"__pycache__"}


def write_bundle(target: Path = BUNDLE) -> int:
    """Write the bundle anew and return its bytes.

    Raises:
        SystemExit: ComfyUI or one of the packages is not here, or the bundle is too large to carry.
    """
    if not (COMFYUI / "comfy").is_dir():
        raise SystemExit(f"no ComfyUI in {COMFYUI}; run: python run.py demo")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(COMFYUI / "comfy", target / "comfy", ignore=python_files_only)
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"package {name} is not installed here; run this with .venv's Python")
        shutil.copytree(next(iter(found.submodule_search_locations)), target / name, ignore=NATIVE)
    (target / "linearize").mkdir()
    (target / "linearize" / "__init__.py").write_text(CHECKOUT, encoding="utf-8")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"the bundle has {size / 2**20:.0f} MiB, more than {MAX_BYTES / 2**20:.0f}")
    return size


if __name__ == "__main__":
    print(f"{write_bundle() / 2**20:.1f} MiB in {BUNDLE.relative_to(ROOT)}", file=sys.stdout)
