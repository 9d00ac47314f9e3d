"""One real server for all tests of this folder."""

import json
import sys
from pathlib import Path

import pytest

from linearize.lab import server as lab_server

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
STAND_INS = FOLDER / "custom_nodes"
sys.path.insert(0, str(FOLDER))


@pytest.fixture(scope="session")
def live():
    """The module that starts servers."""
    return lab_server


@pytest.fixture(scope="session")
def output(tmp_path_factory):
    """The server's output folder: samples and jobs of `run.py serve` lie in another one."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="session")
def server(live, output, tmp_path_factory):
    """A server that is strict about declines, and has the nodes that stand in for encoders."""
    paths = tmp_path_factory.mktemp("server") / "paths.yaml"
    paths.write_text(f"tests:\n  custom_nodes: {json.dumps(str(STAND_INS))}\n", encoding="utf-8")
    options = ["--extra-model-paths-config", str(paths), "--output-directory", str(output)]
    with live.live_server(environment={"LINEARIZE_STRICT": "1"}, options=options) as running:
        yield running
