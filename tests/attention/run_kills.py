"""Kills processes that write, at many moments; prints what lies in the folder afterwards, one name a line.

usage: run_kills.py folder kills [hidden]; with `hidden`, as on a system whose files have names from the start.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from linearize.attention.tensor_file import write_tensor_file

SIZE = 2**20  # of a tensor: a write takes some milliseconds


def write_for_ever(folder, count):
    """Write new files and replace one, over and over."""
    for number in range(10_000):
        tensors = {"a": torch.full((SIZE,), 1.0), "b": torch.full((SIZE,), 2.0)}
        write_tensor_file(folder / "replaced.safetensors", tensors, {"number": str(number)})
        write_tensor_file(folder / f"new_{count}.safetensors", tensors, {"number": str(number)})


def main(folder, kills):
    """Fork a writer, kill it a moment later, and again."""
    dice = random.Random(7)
    for count in range(kills):
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(folder, count)
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.03, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sys.stdout.write("\n".join(sorted(os.listdir(folder))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3:] == ["hidden"]:
        del os.O_TMPFILE
    main(Path(sys.argv[1]), int(sys.argv[2]))
