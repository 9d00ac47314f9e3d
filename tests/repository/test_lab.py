"""The lab is one package of relative imports, runs from the checkout's root, and is nothing that the pack imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = sorted((ROOT / "lab").rglob("*.py"))
PACK = [
    path for layer in ("attention", "kernels", "nodes", "patching", "training") for path in (ROOT / layer).rglob("*.py")
]


def imported(path):
    """Yield the dots and the name of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names)


@pytest.mark.parametrize("path", LAB, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_it_finds_itself_without_the_path(path):
    absolute = {name for dots, name in imported(path) if not dots}
    assert not [name for name in absolute if name.split(".")[0] == "lab" or name.startswith("linearize.lab")]
    siblings = {each.stem for each in path.parent.glob("*.py")} - sys.stdlib_module_names
    assert not absolute & siblings
    assert "sys.path" not in path.read_text(encoding="utf-8") or path == ROOT / "lab" / "__init__.py"


def test_the_pack_does_not_import_it():
    bad = [path for path in PACK for _, name in imported(path) if "lab" in name.split(".")]
    assert bad == []


def test_the_node_pack_of_the_demo_stands_alone():
    """ComfyUI gets this folder only, by a link; and training reads its captions without ComfyUI."""
    folder = ROOT / "lab" / "demo" / "nodes"
    assert not [path for path in folder.glob("*.py") for dots, _ in imported(path) if dots > 1]
    code = (
        "import sys, linearize.lab.demo.nodes.captions, linearize.lab.demo.nodes.clip_latents;"
        "sys.exit(any(name.startswith('comfy') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_a_module_runs_and_the_checkout_hides_no_module_of_comfyui():
    command = [sys.executable, "-m", "lab.benchmarks.run", "--suite", "fast"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "no suite fast; there are clear-cpu" in result.stderr
    code = "import importlib.util, sys, lab; sys.exit(importlib.util.find_spec('nodes') is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
