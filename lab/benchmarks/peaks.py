"""Peak memory in MiB, each case in a process of its own: `python -m lab.benchmarks.peaks SUITE CASE CONTENDER`.

`memory.py` tells how it is counted. A small call goes first, because libraries allocate their work space on first use.

Of a contender of a suite it is what one call takes beyond its inputs, output included. Of a causal clip it is all that
the clip takes, inputs and output included: the direct form needs the queries, keys and values of all frames at once,
the stream those of one chunk, and its caller keeps no output. What the stream itself holds between two chunks is the
bytes of the storages that its tensors lie in, without the feature maps; a view of a larger tensor counts whole.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor

from linearize.attention import attention
from linearize.attention.kinds.chunked import CausalStream
from linearize.attention.students.learned import new_maps

from .. import ROOT
from .contenders import runnable
from .memory import ENVIRONMENT, peak_of
from .registry import STREAMS, SUITES, Shape, StreamSuite

FORMS = ("direct", "stream")
SMALL = 256  # pixels a side of the call that goes first


def main() -> None:
    suite, case, contender = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if suite in STREAMS:
        columns = stream_memory(STREAMS[suite], int(case), contender, device)
    else:
        columns = {"peak_mib": call_peak(suite, int(case), contender, device)}
    print(json.dumps(columns))


def in_own_process(suite: str, case: int, contender: str) -> dict[str, str]:
    """Return the columns of memory of a case, measured by a fresh process.

    Args:
        suite: of `registry.py`.
        case: number of the shape in a suite; of a stream, frames of the clip.
        contender: name in the suite; of a stream, one of FORMS.
    """
    command = [sys.executable, "-m", "lab.benchmarks.peaks", suite, str(case), contender]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT)
    if result.returncode:
        print(f"{contender}: no peak memory: {result.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
        return {}
    return json.loads(result.stdout.splitlines()[-1])  # libraries may print too


def call_peak(suite_name: str, case: int, contender: str, device: str) -> str:
    """Return the peak of one call beyond its inputs; empty where the platform cannot tell."""
    suite = SUITES[suite_name]
    shape = suite.shapes[case]
    for small in runnable(suite, replace(shape, width=SMALL, height=0), device, contender).values():
        small()
    return peak_of(runnable(suite, shape, device, contender)[contender], device)


@torch.no_grad()
def stream_memory(suite: StreamSuite, frames: int, form: str, device: str) -> dict[str, str]:
    """Return the peak of a causal clip with its inputs and, of a stream, what it holds behind the last frame."""
    spec, shape = suite.spec, replace(suite.shape, frames=frames)
    maps = new_maps(spec, shape.heads, shape.head_dim)
    maps = maps[0].to(device), maps[1].to(device)

    def direct(clip: Shape) -> None:
        attention(*clip.inputs(device), clip.layout, spec, maps=maps, backend="torch")

    def stream(clip: Shape) -> CausalStream:
        rows, columns = clip.grid
        result = CausalStream(spec, maps, rows * columns)
        for start in range(0, clip.frames, spec.chunk_frames):
            arriving = replace(clip, frames=min(spec.chunk_frames, clip.frames - start))
            result.step(*arriving.inputs(device))
        return result

    held: list[int] = []
    run = direct if form == "direct" else lambda clip: held.append(held_bytes(stream(clip)))
    run(replace(shape, width=SMALL, height=0, frames=2 * spec.chunk_frames))
    peak = peak_of(lambda: run(shape), device)
    return {"peak_mib": peak, "held_mib": f"{held[-1] / 2**20:.2f}" if held else ""}


def held_bytes(thing: object) -> int:
    """Return the bytes of all storages that tensors in dataclasses, tuples and lists lie in."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(thing)}
    return sum(storages.values())


def _tensors(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for each in thing:
            yield from _tensors(each)
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from _tensors(getattr(thing, field.name))


if __name__ == "__main__":
    main()
