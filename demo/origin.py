"""Where, with what and when the figures of a demo were taken, as its table says it."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch
from live_server import ROOT


def origin(seconds: float) -> dict[str, Any]:
    """Return date, commit, torch, machine and device of a run that took some seconds."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": importlib.metadata.version("torch"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU",
        "seconds": round(seconds),
    }


def commit() -> str:
    """Return the commit of the checkout, with + if a script or module was changed since; empty without git."""
    questions = (["describe", "--always"], ["status", "--porcelain", "--untracked-files=no", "--", "*.py"])
    try:
        found, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
            for words in questions
        )
    except OSError:
        return ""
    return found + "+" * bool(changed)
