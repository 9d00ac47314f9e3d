"""Every name of ComfyUI that the shipped pack uses exists in the ComfyUI of these tests, also one looked up late.

Only source text is read: nothing is imported, and a default of `getattr` hides nothing.
"""

import ast
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("LINEARIZE_COMFYUI", ROOT / ".comfyui" / "comfyui"))
MODULES = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
           "server")  # fmt: skip
DOTTED = re.compile(rf"({'|'.join(MODULES)})(\.\w+)+")
EVERY_MODULE_HAS = ("__file__", "__name__", "__path__")
NEWER = {  # names that only newer cores have, imported where their absence is handled; and where each was read
    "comfy.model_prefetch.pause_malloc_graph": "comfy/model_prefetch.py of ComfyUI 0.38.1; 0.34 brought it",
}


def shipped() -> list[Path]:
    """Return the Python files that a user receives."""
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if not f"/{name}".startswith(tuple(ignored)) and (ROOT / name).is_file()]


# ------------------------------------------------------------------------------------- what the pack refers to


def chain(node: ast.AST, aliases: dict[str, str]) -> str:
    """Return the dotted name that an expression stands for, empty if it begins with nothing imported."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        before = chain(node.value, aliases)
        return before and f"{before}.{node.attr}"
    return ""


def imports(tree: ast.AST) -> tuple[dict[str, str], dict[str, int]]:
    """Return what names of the file stand for, and the dotted names that it imports, with their lines."""
    aliases, found = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in MODULES:
                    found[alias.name] = node.lineno
                    aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found[f"{node.module}.{alias.name}"] = node.lineno
    for node in ast.walk(tree):  # module = comfy.ops
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            dotted = chain(node.value, aliases)
            aliases |= {node.targets[0].id: dotted} if module_file(dotted) else {}
    return aliases, found


def references(tree: ast.AST) -> dict[str, int]:
    """Return the dotted names of ComfyUI that a file uses, with a line of each; "?" is a name that nobody can read."""
    aliases, found = imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (dotted := chain(node, aliases)):
            found[dotted] = node.lineno
        if isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and DOTTED.fullmatch(str(first.value)):  # import_module and its like
                found[str(first.value)] = node.lineno
            dotted = chain(first, aliases)
            if dotted and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
                name = node.args[1]
                found[f"{dotted}.{name.value if isinstance(name, ast.Constant) else '?'}"] = node.lineno
    return found


def handled(tree: ast.AST) -> set[str]:
    """Return the names that a file imports inside `try`, with an answer to their absence."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    ready = [node for node in tries if any(ast.unparse(each.type or node) == "ImportError" for each in node.handlers)]
    found = [each for node in ready for each in node.body if isinstance(each, ast.ImportFrom)]
    return {f"{each.module}.{alias.name}" for each in found for alias in each.names}


# ---------------------------------------------------------------------------------------- what ComfyUI defines


@cache
def module_file(dotted: str) -> Path | None:
    """Return the file of one of ComfyUI's modules, or the folder of a package without one."""
    if dotted.split(".")[0] not in MODULES:
        return None
    path = COMFYUI.joinpath(*dotted.split("."))
    places = (path.with_suffix(".py"), path / "__init__.py", path)
    return next((place for place in places if place.is_file() or (place == path and place.is_dir())), None)


@cache
def module_names(dotted: str) -> dict[str, ast.AST | str]:
    """Return what a module binds: the statement that does it, or the dotted name that it imports."""
    file = module_file(dotted)
    if file is None or file.is_dir():
        return {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = dotted if file.name == "__init__.py" else dotted.rpartition(".")[0]
    names = bindings(tree.body, package)
    for node in ast.walk(tree):  # Class.attribute = ..., from any function
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names.setdefault(f"{node.value.id}.{node.attr}", node)
    return names


def bindings(body: list[ast.stmt], package: str) -> dict[str, ast.AST | str]:
    """Return what statements bind, looking into branches but not into functions."""
    names: dict[str, ast.AST | str] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            names |= {top: top for alias in node.names if not alias.asname for top in [alias.name.split(".")[0]]}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name == "*":
                    names |= module_names(base)
                else:
                    names[alias.asname or alias.name] = f"{base}.{alias.name}"
        else:
            for each in ast.walk(node):
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                    names[each.id] = each
            for inner in ("body", "orelse", "finalbody", "handlers"):
                for block in getattr(node, inner, []):
                    names |= bindings(block.body if isinstance(block, ast.ExceptHandler) else [block], package)
    return names


def exists(dotted: str) -> bool:
    """Return whether ComfyUI defines a name, as far as its source tells: what an object has is not looked at."""
    parts = dotted.split(".")
    if module_file(dotted):
        return True
    cut = next((end for end in range(len(parts) - 1, 0, -1) if module_file(".".join(parts[:end]))), 0)
    if not cut:
        return parts[0] not in MODULES  # another library, which ComfyUI imports
    module = ".".join(parts[:cut])
    return defined(parts[cut:], module_names(module), module)


def defined(parts: list[str], scope: dict[str, ast.AST | str], module: str) -> bool:
    found = scope.get(parts[0])
    if found is None:
        return parts[0] in EVERY_MODULE_HAS
    if len(parts) == 1:
        return not isinstance(found, str) or exists(found)
    if isinstance(found, str):
        return exists(".".join([found, *parts[1:]]))
    if not isinstance(found, ast.ClassDef) or f"{found.name}.{parts[1]}" in module_names(module):
        return True
    if defined(parts[1:], bindings(found.body, module.rpartition(".")[0]), module):
        return True
    bases = [ast.unparse(base).split(".") for base in found.bases]
    return any(base[0] not in module_names(module) or defined([*base, *parts[1:]], module_names(module), module)
               for base in bases)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(autouse=True)
def _comfyui():
    if not (COMFYUI / "comfy").is_dir():
        pytest.skip("no ComfyUI here; run the tests with: python run.py test")


def missing(path: Path) -> list[str]:
    """Return the names of a file that ComfyUI does not have, or newer ones alone and the file does not say so."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed, used = NEWER.keys() & handled(tree), references(tree)
    return [f"line {line}: {name}" for name, line in used.items()
            if (name in NEWER or not exists(name)) and name not in allowed]  # fmt: skip


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_name_of_comfyui_exists(path):
    assert missing(path) == [], "list names of newer cores alone in NEWER; import them in try, except ImportError"


def test_no_name_of_newer_cores_is_left_over():
    used = {name for path in shipped() for name in references(ast.parse(path.read_text(encoding="utf-8")))}
    assert len(used) > 100, "the search finds the pack's references"
    assert NEWER.keys() <= used


def test_the_check_can_tell(tmp_path):
    """Every way of naming something is seen, and what exists is not reported."""
    wrong = {
        4: "comfy.ops.no_such_name",
        5: "comfy.ops.no_such_name_either",
        6: "comfy.memory_management.pause_malloc_graph",
        7: "comfy.patcher_extension.CallbacksMP.ON_NOTHING",
        8: "comfy.no_such_module",
        9: "comfy.model_management.?",
        10: "comfy_api.latest.io.Nothing",
        12: "comfy.samplers.no_such_sampler",
        15: "comfy.model_prefetch.pause_malloc_graph",
    }
    good = "try:\n    from comfy.model_prefetch import pause_malloc_graph\nexcept ImportError:\n    pass\n"
    path = tmp_path / "bad.py"
    path.write_text(
        "import comfy.memory_management, comfy.model_management, comfy.samplers\n"
        "from comfy.patcher_extension import CallbacksMP\n"
        "from comfy_api.latest import io\n"
        "from comfy.ops import no_such_name, cast_to\n"
        "def f(): import comfy.ops as o; return o.no_such_name_either, o.cast_to, o.disable_weight_init.Linear\n"
        "def g(): return getattr(comfy.memory_management, 'pause_malloc_graph', None)\n"
        "called = CallbacksMP.ON_CLONE, CallbacksMP.ON_NOTHING\n"
        "late = __import__('comfy.no_such_module')\n"
        "h = hasattr(comfy.model_management, input())\n"
        "schema = io.Model.Input, io.Nothing, io.ComfyNode.define_schema\n"
        "module = comfy.samplers\n"
        "found = getattr(module, 'no_such_sampler', None) or module.KSampler.SAMPLERS\n"
        "from server import PromptServer\n"
        "instance = getattr(PromptServer, 'instance', None)\n"
        "import comfy.model_prefetch; pause = getattr(comfy.model_prefetch, 'pause_malloc_graph', None)\n",
        encoding="utf-8",
    )
    assert sorted(missing(path)) == sorted(f"line {line}: {name}" for line, name in wrong.items())
    path.write_text(good, encoding="utf-8")
    assert missing(path) == []
    path.write_text(good.replace("ImportError", "ValueError"), encoding="utf-8")
    assert missing(path) == ["line 2: comfy.model_prefetch.pause_malloc_graph"]
