"""The import law: nodes -> training -> attention -> kernels, and comfy only where it is allowed."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "attention", "training", "nodes")  # each may import itself and those before it
HOST_APPLICATION = {
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview", "server",
}  # fmt: skip
PATCHER_METHODS = {
    "add_callback", "add_callback_with_key", "add_object_patch", "add_patches", "add_wrapper", "add_wrapper_with_key",
    "model_options", "remove_callbacks_with_key", "remove_wrappers_with_key", "set_additional_models",
    "set_attachments", "set_injections", "set_model_attn1_patch", "set_model_unet_function_wrapper",
}  # fmt: skip
NO_HOSTS = (["base"], ["source"])  # what hosts, and what judges models beside them, may share
MAY_TOUCH_PATCHERS = {"nodes/patching.py", "nodes/weight_patches.py", "training/comfy_patch.py"}


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


def violations(path: Path):
    relative = path.relative_to(ROOT).as_posix()
    layer = relative.split("/")[0]
    for line, name in imported(path):
        top = name.split(".")[0]
        if top in LAYERS and LAYERS.index(top) > LAYERS.index(layer):
            yield f"{relative}:{line} imports {name} from a layer above"
        if top == "linearize":
            yield f"{relative}:{line} imports its own pack by an absolute name"
        in_nodes = layer == "nodes" or relative.startswith("training/comfy_")
        if top in HOST_APPLICATION and not in_nodes:
            yield f"{relative}:{line} imports {name}, which only nodes/ and training/comfy_*.py may"
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
def test_only_the_patching_modules_touch_a_model_patcher(path):
    if path.relative_to(ROOT).as_posix() in MAY_TOUCH_PATCHERS:
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
        "import sys, linearize.attention, linearize.attention.runtime, linearize.attention.report;"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('comfy', 'nodes', 'folder_paths', 'comfy_api')];"
        "sys.exit(repr(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
