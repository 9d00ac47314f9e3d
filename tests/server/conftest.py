"""One real server for all tests of this folder."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def live():
    """The module that starts servers."""
    spec = importlib.util.spec_from_file_location("live_server", ROOT / "demo" / "live_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def server(live):
    """A server that is strict about declines."""
    with live.live_server(environment={"LINEARIZE_STRICT": "1"}) as running:
        yield running
