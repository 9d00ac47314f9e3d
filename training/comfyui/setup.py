"""Makes ComfyUI importable in a process that ComfyUI did not start. Imports nothing of it before.

Its command line is not read here: what it would choose by arguments keeps its defaults, but for the device.
"""

import os
import sys
from pathlib import Path

import torch

VARIABLE = "LINEARIZE_COMFYUI"


def find_comfyui(named: Path | None) -> Path:
    """Return ComfyUI's root: the one named, that of the environment, or the one whose custom_nodes holds the pack.

    Raises:
        ValueError: none of them holds ComfyUI.
    """
    if named is not None:
        places = [named]
    elif os.environ.get(VARIABLE):
        places = [Path(os.environ[VARIABLE])]
    else:  # a linked pack lies where the link does, and a checkout may hold a ComfyUI of its own
        file = Path(os.path.abspath(__file__))
        places = [file.parents[3], file.resolve().parents[3], file.resolve().parents[1] / ".comfyui" / "comfyui"]
    for place in places:
        if (place / "comfy" / "sd.py").is_file():
            return place.resolve()
    raise ValueError(
        f"there is no ComfyUI in {places[0]}; name the folder that holds its main.py as comfyui in the job, or in "
        f"the environment as {VARIABLE}"
    )


def prepare(root: Path, *, on_cpu: bool) -> None:
    """Put ComfyUI on the path and choose its device; call it before anything of ComfyUI is imported.

    Args:
        root: of ComfyUI.
        on_cpu: leave accelerators alone; so it is anyway where PyTorch finds none.
    """
    sys.path.insert(0, str(root))
    import comfy.cli_args

    if on_cpu or not torch.accelerator.is_available():
        comfy.cli_args.args.cpu = True
        comfy.cli_args.args.use_pytorch_cross_attention = True
