"""The import law: nodes -> training -> patching -> attention -> kernels, rooms in order, comfy where it is allowed."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "attention", "patching", "training", "nodes")  # each may import itself and those before it
ROOMS = {  # the same inside a layer; "" is the layer's own files
    "attention": ("", "kinds", "gpu", "hosts", "students", "planning", "runtime", "calibration", "hub"),
    "training": ("samples", "engine", "transfer", "finetune", "jobs", "comfyui", ""),
}
MAY_USE_COMFYUI = ("nodes", "patching", "training/comfyui")
HOST_APPLICATION = {
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview", "server",
}  # fmt: skip
PATCHER_METHODS = {
    "add_callback", "add_callback_with_key", "add_object_patch", "add_patches", "add_wrapper", "add_wrapper_with_key",
    "model_options", "remove_callbacks_with_key", "remove_wrappers_with_key", "set_additional_models",
    "set_attachments", "set_injections", "set_model_attn1_patch", "set_model_unet_function_wrapper",
}  # fmt: skip
# what hosts, and what judges models beside them, may share
NO_HOSTS = (
    ["base"],
    ["double_single"],
    ["site_hooks"],
    ["class_code"],
)


def modules():
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path):
    """Yield (line, dotted name); relative imports become names below the checkout, such as `attention.specs`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(path.relative_to(ROOT).parts[:-1])
            above = base[: len(base) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, name
            if node.level:
                yield from ((node.lineno, f"{name}.{alias.name}" if name else alias.name) for alias in node.names)


def room(path: str) -> str:
    """Return in which of a layer's rooms a module or a file is, "" for the layer's own."""
    layer, _, rest = path.partition("/")
    first = rest.partition("/")[0]
    return first if first in ROOMS.get(layer, ()) else ""


def violations(path: Path):
    relative = path.relative_to(ROOT).as_posix()
    layer = relative.split("/")[0]
    for line, name in imported(path):
        top = name.split(".")[0]
        if top in LAYERS and LAYERS.index(top) > LAYERS.index(layer):
            yield f"{relative}:{line} imports {name} from a layer above"
        if top == "linearize":
            yield f"{relative}:{line} imports its own pack by an absolute name"
        rooms, own, other = ROOMS.get(layer, ()), room(relative), room(name.replace(".", "/"))
        is_door = relative == f"{layer}/__init__.py"  # what a layer offers; nothing in the layer imports it
        if top == layer and rooms and not is_door and rooms.index(other) > rooms.index(own):
            yield f"{relative}:{line} imports {name} from a room above"
        if top in HOST_APPLICATION and not relative.startswith(MAY_USE_COMFYUI):
            yield f"{relative}:{line} imports {name}, which only {', '.join(MAY_USE_COMFYUI)} may"
        if relative.startswith("attention/hosts/") and not relative.endswith("__init__.py"):
            parts = name.split(".")
            if parts[:2] == ["attention", "hosts"] and parts[2:3] not in ([], *NO_HOSTS):
                yield f"{relative}:{line} imports {name}; hosts do not import each other"
        if top == "triton" and layer != "kernels":
            yield f"{relative}:{line} imports triton outside kernels/"
        if layer == "kernels" and top not in {"kernels", "torch", "triton", *sys.stdlib_module_names}:
            yield f"{relative}:{line} imports {name}; kernels take tensors from torch and triton only"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path):
    assert list(violations(path)) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_patching_touches_a_model_patcher(path):
    if path.relative_to(ROOT).parts[0] == "patching":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & PATCHER_METHODS


def test_the_law_can_be_broken(tmp_path, monkeypatch):
    """A file that breaks each rule is caught, so the tests above can fail."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = tmp_path / "attention" / "hosts" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "import comfy.ops\nimport triton\nfrom linearize.attention import x\nfrom ...nodes import clear\n"
        "from .flux import FluxHost\nfrom .base import Host\n",
        encoding="utf-8",
    )
    lines = {int(text.split(":")[1].split()[0]) for text in violations(bad)}
    assert lines == {1, 2, 3, 4, 5}
    bad = tmp_path / "attention" / "kinds" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("from ..runtime import record\nfrom ..runtime.record import x\nfrom ..specs import ClearSpec\n")
    assert {int(text.split(":")[1].split()[0]) for text in violations(bad)} == {1, 2}
    bad = tmp_path / "training" / "engine" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("import comfy.sample\nfrom ..worker import x\nfrom ...patching import host_of\nfrom . import loop\n")
    assert {int(text.split(":")[1].split()[0]) for text in violations(bad)} == {1, 2}
    bad = tmp_path / "patching" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import comfy.ops\nfrom ..training.engine import loop\nfrom ..attention import specs\n")
    assert {int(text.split(":")[1].split()[0]) for text in violations(bad)} == {2}
    bad = tmp_path / "kernels" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import math\nimport torch\nimport triton\nimport numpy\nfrom ..attention import layout\n")
    lines = {int(text.split(":")[1].split()[0]) for text in violations(bad)}
    assert lines == {4, 5}


def test_the_root_module_imports_nothing_of_the_pack():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_attention_imports_without_comfyui():
    import subprocess
    import sys

    code = (
        "import sys, linearize.attention, linearize.attention.runtime.runtime, linearize.attention.planning.report;"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('comfy', 'nodes', 'folder_paths', 'comfy_api')];"
        "sys.exit(repr(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
