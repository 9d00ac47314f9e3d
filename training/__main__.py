"""The command `python -m linearize.training job.json`: one training job without ComfyUI's server.

torchrun starts `worker.py` beside this file instead, once per process. `docs/training.md` describes the job's file.
"""

import sys
from pathlib import Path

from .worker import heed_signals, work

USAGE = "usage: python -m linearize.training job.json"


def main(arguments: list[str]) -> int:
    """Do a job; return the exit code: 0 done or stopped by a signal, 1 with one sentence on stderr, 2 misuse.

    Args:
        arguments: the job's file; nodes that start processes also name the folder of all jobs.
    """
    if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
        sys.stderr.write(USAGE + "\n")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    talk()
    return run(*map(Path, arguments))


def run(file: Path, root: Path | None = None) -> int:
    """Do the job of a file; return the exit code, see `main`."""
    # here, so that a signal works while they are imported
    from .comfyui.setup import find_comfyui, prepare
    from .engine.loop import OutOfMemory
    from .jobs.description import read_job
    from .jobs.distributed import OtherProcessFailed, join
    from .jobs.progress_file import ProgressFile

    folder: Path | None = None
    try:
        job = read_job(file)
        folder = job.folder
        workers = join(on_cpu=job.device == "cpu")
        with workers.reporting():
            prepare(find_comfyui(job.comfyui), on_cpu=job.device == "cpu")
            from .comfyui.worker import StoppedEarly, train

            try:
                text = train(job, workers, root)
            except StoppedEarly as stopped:
                text = str(stopped)
        workers.close()
    except (ValueError, OutOfMemory) as problem:
        if folder is not None:
            ProgressFile(folder).add({"problem": str(problem)})
        sys.stderr.write(f"{problem}\n")
        return 1
    except OtherProcessFailed:
        return 1
    if workers.rank == 0:
        sys.stdout.write(text + "\n")
    return 0


def talk() -> None:
    """Have the pack's own messages on stdout."""
    import logging

    pack = logging.getLogger(__package__.rpartition(".")[0] if __package__ else None)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    pack.addHandler(handler)
    pack.setLevel(logging.INFO)
    pack.propagate = False


if __name__ == "__main__":
    heed_signals()
    work(sys.argv[1:])
