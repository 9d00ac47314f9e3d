"""What a user of ComfyUI Manager receives: comfy-cli's own check and archive, and that the archive works alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFY = ROOT / ".comfyui" / "cli" / "bin" / "comfy"


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The archive that `comfy node pack` makes of a copy of the tracked files."""
    if not COMFY.exists():
        pytest.skip("comfy-cli is not installed; run the tests with: python run.py test")
    copy = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=copy, check=True)
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HOME": str(tmp_path_factory.mktemp("home"))}
    for verb in ("validate", "pack"):
        result = subprocess.run(
            [str(COMFY), "--no-json", "--skip-prompt", "node", verb],
            cwd=copy,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        said = result.stdout + result.stderr
        assert not [code for code in ("S102", "S307", "E702") if code in said], said
    return copy / "node.zip"


def test_the_archive_is_small_and_clean(archive):
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        size = sum(info.file_size for info in packed.infolist())
    tops = {name.split("/")[0] for name in names}
    assert tops >= {"__init__.py", "attention", "nodes", "web", "locales", "workflows", "pyproject.toml", "README.md"}
    assert not tops & {"tests", "demo", "benchmarks", "docs", ".ci", ".github", "run.py", "constraints.txt"}
    assert size < 2 * 10**6
    assert not [name for name in names if len(name) > 80 or set(name) & set('<>:"|?*\\')], "not a Windows path"


def test_the_archive_works_alone(archive, tmp_path):
    """Unpacked under another name it imports, and its attention runs, with nothing of the checkout on the path."""
    folder = tmp_path / "some pack-1.0"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    code = f"""
import importlib.util, sys
root = r"{folder}"
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
import torch
from pack.attention import ClearSpec, TokenLayout, attention, grid_segment
layout = TokenLayout.of((grid_segment("main", 1, 9, 9),))
q = torch.randn(1, 1, 81, 8)
assert attention(q, q, q, layout, ClearSpec(3)).shape == q.shape
assert callable(module.comfy_entrypoint) and module.WEB_DIRECTORY == "./web"
assert "linearize" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
