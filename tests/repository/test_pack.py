"""What a user of ComfyUI Manager receives: comfy-cli's own check and archive, and that the archive works alone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFY = ROOT / ".comfyui" / "cli" / "bin" / "comfy"
COMFYUI = Path(os.environ.get("LINEARIZE_COMFYUI", ROOT / ".comfyui" / "comfyui"))
SUFFIXES = {".py", ".md", ".json", ".jpg", ".toml", ".js", ".txt", ""}
WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[. ]", re.IGNORECASE)
COMFYUI_MODULES = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}
COMFYUI_REQUIRES = {"PIL", "numpy", "safetensors", "scipy", "torch"}
REQUESTS_BRINGS = {"urllib3"}
OURS_ALONE = ("linearize", "pytest", "hypothesis", "playwright", "comfy_lint", "ruff")  # on no user's machine


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
    pages = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "requirements.txt"}
    needed = {"__init__.py", "attention", "nodes", "web", "locales", "workflows", "subgraphs", *pages}
    assert needed <= tops <= needed | {"kernels", "patching", "training"}
    assert size < 3 * 10**6
    assert {PurePosixPath(name).suffix for name in names} <= SUFFIXES
    assert not [name for name in names if "__pycache__" in name or name.startswith("workflows/api/")]


def test_windows_can_unpack_the_archive(archive):
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    assert len({name.lower() for name in names}) == len(names), "two names differ in case only"
    for name in names:  # with spaces, because a blueprint is shown under the name of its file
        assert len(name) <= 80 and re.fullmatch(r"[\w ./-]+", name, re.ASCII), name
        assert not [part for part in PurePosixPath(name).parts if WINDOWS_NAMES.fullmatch(part)], name


def test_the_archive_imports_only_what_is_there(archive):
    """Python's own modules, ComfyUI's, the requirements; a Triton is optional, for the kernels alone."""
    with zipfile.ZipFile(archive) as packed:
        sources = {name: packed.read(name).decode() for name in packed.namelist() if name.endswith(".py")}
        required = set(re.findall(r"^[\w-]+", packed.read("requirements.txt").decode(), re.MULTILINE))
    allowed = sys.stdlib_module_names | COMFYUI_MODULES | COMFYUI_REQUIRES | REQUESTS_BRINGS | required
    for name, source in sources.items():
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
        assert found <= allowed | ({"triton"} if name.startswith("kernels/") else set()), name


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


def test_comfyui_loads_the_archive_from_a_path_with_spaces(archive, tmp_path):
    """ComfyUI's own loader, without the editable install and the tools that only developers have."""
    if not (COMFYUI / "nodes.py").exists():
        pytest.skip("no ComfyUI here; run the tests with: python run.py test")
    folder = tmp_path / "My ComfyUI" / "custom_nodes" / "linearize 0.1"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    code = f"""
import asyncio, sys
from pathlib import Path
sys.modules.update(dict.fromkeys({OURS_ALONE!r}))  # None means that importing them fails
sys.path.insert(0, {str(COMFYUI)!r})
sys.argv = ["main.py", "--cpu", "--base-directory", {str(folder.parents[1])!r}]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
assert asyncio.run(nodes.load_custom_node({str(folder)!r}, module_parent="custom_nodes"))
ours = {{name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Linearize")}}
pages = {{path.stem for path in Path(nodes.EXTENSION_WEB_DIRS[{folder.name!r}], "docs").glob("*.md")}}
assert ours and ours == pages, (ours, pages)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
