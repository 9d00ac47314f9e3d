"""What this machine, its Triton and a call's numbers allow. Imports no Triton and runs nothing on a device."""

import functools
import importlib.util
import os
import sys

import torch

MAX_HEAD_SIZE = 256
INTERPRETED = "interpreted"


def is_interpreted() -> bool:
    """Return whether Triton's interpreter replaces the compiler; it is for tests, slow, and runs on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Return whether a package named triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the name under which `tuning.py` knows a device: sm80, sm86, sm90, sm100, sm120, cdna, amd, interpreted,
    other.

    sm86 stands for all cards with 99 KB of shared memory per program before Blackwell (8.6, 8.7 and 8.9).
    """
    if is_interpreted():
        return INTERPRETED
    if torch.version.hip:  # cards for computing have twice the registers of a thread
        return "cdna" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9") else "amd"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm86" if minor else "sm80"
    return {9: "sm90", 10: "sm100", 12: "sm120"}.get(major, "other")


def refusal(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str] | None:
    """Return a code and a sentence for why the kernels cannot run, or None if they can.

    Args:
        device, dtype: of the query.
        head_size: D.
    """
    if device.type != "cuda" and not is_interpreted():
        return "device", f"backend triton needs an NVIDIA or AMD GPU, got {device.type}"
    if not has_triton():
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return "triton", f"backend triton needs Triton, which is not installed; try: pip install {package}"
    if not is_interpreted() and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return "device", f"backend triton needs compute capability 8.0 or newer, this card has {major}.{minor}"
    # the interpreter multiplies the bit patterns of bfloat16; a compiled fp32 tile would not fit
    supported = (torch.float16, torch.float32) if is_interpreted() else (torch.float16, torch.bfloat16)
    if dtype not in supported:
        names = " and ".join(str(each).removeprefix("torch.") for each in supported)
        return "dtype", f"backend triton computes {names}, got {str(dtype).removeprefix('torch.')}"
    if head_size > MAX_HEAD_SIZE:
        return "head_size", f"backend triton takes heads of up to {MAX_HEAD_SIZE} values, got {head_size}"
    return None
