"""Official templates with CLEAR behind every loader: all sites run on windows."""

import json
import importlib.util
from pathlib import Path
import pytest
import os

NAMES = sorted(json.load(open("/tmp/tw/names.json")))

@pytest.mark.parametrize("name", NAMES)
def test_every_site_runs(name, templates, execute):
    for run in templates[name].runs():
        runtimes = execute(run)
        assert runtimes
        for runtime in runtimes:
            assert runtime is not None
            record = runtime.record
            assert not record.declined, record.summary()
            assert {(r.site, r.kind, r.backend) for r in record.ran} == {(s, "clear", "torch") for s in runtime.sites}, record.summary()
