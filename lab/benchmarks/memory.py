"""Peak memory of a call in MiB.

On a GPU it is PyTorch's own count. On a CPU it is the growth of the peak resident set, which the kernel of Linux counts
and forgets on request; elsewhere it is not measured. A process that measures is started with `ENVIRONMENT`: malloc maps
every large block by itself then, so that what is freed goes back at once and neither hides later growth nor adds to it.
"""

from collections.abc import Callable
from pathlib import Path

import torch

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # glibc's; 64 KiB


def peak_of(function: Callable[[], object], device: str) -> str:
    """Return MiB that a call needs beyond what there is before; empty where the platform cannot tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return ""
    before = _peak_rss()
    function()
    return f"{(_peak_rss() - before) / 2**20:.0f}"


def _peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
