"""The tree of the repository: every folder and module with the first sentence of its docstring."""

import ast
import subprocess
from pathlib import Path

from .. import ROOT

LAYERS = ("kernels", "attention", "patching", "training", "nodes")  # in the order of the import law; others follow
MAX_LENGTH = 120  # of a first paragraph


def modules() -> list[Path]:
    """Return every Python file that is not a test, relative to the repository, folder by folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [Path(name) for name in set(names) if (ROOT / name).is_file() and not name.startswith("tests/")]
    return sorted(paths, key=lambda path: (_order(path.parts[0]), path.parent.parts, path.name))


def _order(top: str) -> tuple[int, str]:
    return (LAYERS.index(top) if top in LAYERS else len(LAYERS), top)


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def tree() -> str:
    """Return a table of modules per folder, each with its line and a link, for a page in docs/."""
    parts = []
    folders: dict[Path, list[Path]] = {}
    for path in modules():
        folders.setdefault(path.parent, []).append(path)
    for folder, paths in folders.items():
        own = [path for path in paths if path.name == "__init__.py"]
        lines = ["| module | is |", "|---|---|"]
        lines += [f"| [{path.name}](../{path.as_posix()}) | {summary(path)} |" for path in paths if path not in own]
        title = f"{folder.as_posix()}/" if folder.parts else "The root"
        about = [summary(own[0])] if own else []
        parts.append("\n\n".join([f"## {title}", *about, *(["\n".join(lines)] if len(lines) > 2 else [])]))
    return "\n\n".join(parts)


def folders() -> str:
    """Return a table of the packages with their lines, for CONTRIBUTING."""
    packages = [path for path in modules() if path.name == "__init__.py" and path.parent.parts]
    lines = ["| folder | holds |", "|---|---|"]
    lines += [f"| [{path.parent.as_posix()}/]({path.parent.as_posix()}) | {summary(path)} |" for path in packages]
    return "\n".join(lines)
