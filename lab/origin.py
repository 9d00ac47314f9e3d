"""Where, with what and when a figure was taken, as stored rows and tables say it."""

import datetime
import os
import platform
import subprocess

import torch

from . import ROOT


def origin(device: str) -> dict[str, str]:
    """Return date, commit, machine and torch of what runs on "cpu" or "cuda"."""
    host = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else host,
        "torch": torch.__version__,
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
