"""`python worker.py job.json`: as `__main__.py`, by the file's place alone. This is what torchrun is given.

An installed pack lies in custom_nodes under any name; here it gets the name `linearize` that its modules are found by.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

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


if __name__ == "__main__":
    name_pack()
    sys.exit(importlib.import_module("linearize.training.__main__").main(sys.argv[1:]))
