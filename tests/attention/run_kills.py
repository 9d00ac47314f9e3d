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

from linearize.attention.students.tensor_file import write_tensor_file

SIZE = 2**18  # numbers of a tensor


def write_for_ever(folder, count, tell):
    """Write a new file and replace another, over and over; tell of each beginning."""
    for number in range(10_000):
        tensors = {"a": torch.full((SIZE,), 1.0), "b": torch.full((SIZE,), 2.0)}
        for name in (f"new_{count}", "replaced"):
            os.write(tell, b".")
            write_tensor_file(folder / f"{name}.safetensors", tensors, {"number": str(number)})


def main(folder, kills):
    """Fork a writer, kill it somewhere in one of its writes, and again."""
    dice = random.Random(7)
    for count in range(kills):
        hear, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(folder, count, tell)
            finally:
                os._exit(1)
        seconds = []
        for _ in range(2 + count % 2):  # the first write tells how long one takes here
            os.read(hear, 1)
            seconds.append(time.monotonic())
        time.sleep(dice.uniform(0.1, 1) * (seconds[1] - seconds[0]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(hear)
        os.close(tell)
    sys.stdout.write("\n".join(sorted(os.listdir(folder))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3:] == ["hidden"]:
        del os.O_TMPFILE
    main(Path(sys.argv[1]), int(sys.argv[2]))
