"""`python worker.py job.json`: as `__main__.py`, by the file's place alone. This is what torchrun is given.

An installed pack lies in custom_nodes under any name; here it gets the name `linearize` that its modules are found by.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

PACK = Path(__file__).resolve().parents[1]


def name_pack() -> None:
    """Make this pack importable as `linearize`, whatever else has that name."""
    # what lies beside this file, and the pack's folder of nodes, would hide modules of others
    hidden = (PACK, PACK / "training")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in hidden]
    spec = importlib.util.spec_from_file_location(
        "linearize", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["linearize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["linearize"])


def leave(code: int) -> NoReturn:
    """End the process without C++ destructors.

    A thread that the process group left running makes them abort now and then ("terminate called without an active
    exception"), which torchrun takes for a failure although the student is saved.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def work(arguments: list[str]) -> NoReturn:
    """Run the command of `__main__.py` and end the process with its exit code, or with 1 after a traceback."""
    try:
        code = importlib.import_module("linearize.training.__main__").main(arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    name_pack()
    work(sys.argv[1:])
