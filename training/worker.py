"""`python worker.py job.json`: `__main__.py` by file path alone, as torchrun starts it.

An installed pack lies in custom_nodes under any name; here it gets the name `linearize` that its modules are found by.
What takes time to import is imported where it is used: signals work from the first line on.
"""

import contextlib
import os
import signal
import sys
from typing import NoReturn

SIGNALS = ("SIGTERM", "SIGINT")
STOPPED = b"stopped; what was saved is kept, run the same command again to go on\n"


def heed_signals() -> None:
    """Make SIGTERM and SIGINT end the process with exit code 0 where no other handler is set."""
    for name in SIGNALS:
        signal.signal(getattr(signal, name), _end)


def _end(*_: object) -> NoReturn:
    # files are whole or not there, so nothing is left to do; buffered streams may be in use at this moment
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(1, STOPPED)
    os._exit(0)


def name_pack() -> None:
    """Make this pack importable as `linearize`, whatever else has that name."""
    import importlib.util
    from pathlib import Path

    pack = Path(__file__).resolve().parents[1]
    # what lies beside this file, and the pack's folder of nodes, would hide modules of others
    hidden = (pack, pack / "training")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in hidden]
    spec = importlib.util.spec_from_file_location(
        "linearize", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["linearize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["linearize"])


def leave(code: int) -> NoReturn:
    """End the process without C++ destructors.

    A thread that the process group left running makes them abort now and then ("terminate called without an active
    exception"), which torchrun takes for a failure although the student is saved.
    """
    import logging

    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def work(arguments: list[str]) -> NoReturn:
    """Run the command of `__main__.py` and end the process with its exit code, or with 1 after a traceback."""
    import importlib
    import traceback

    try:
        code = importlib.import_module("linearize.training.__main__").main(arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    heed_signals()
    name_pack()
    work(sys.argv[1:])
