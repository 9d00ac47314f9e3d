"""Mutation testing: small faults put into a copy of the pack one at a time, and whether its unit tests notice.

    python -m pip install cosmic-ray==8.7.0
    python tests/mutation.py                    # a sample of every module below
    python tests/mutation.py --seed 2 plans     # another sample of one of them

Prints a line per mutant, the change of each that survived, and the score. A survivor is a missing test, code that is
not needed, or a change that changes nothing. The checkout is only read. Needs `os.fork`.
"""

import argparse
import ast
import difflib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis  # noqa: F401  # loaded once for all mutants, as PyTorch is
import pytest
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
SHARE, LEAST = 0.08, 4  # of the places of a module at which something can be changed
TESTS = {  # modules, and the test files that are run for each of their mutants
    "runtime/decisions runtime/runtime runtime/override hosts/site_hooks":
        "runtime/runtime runtime/override runtime/record hosts/site_hooks memory",
    "runtime/record": "runtime/record runtime/runtime shown",
    "plans": "plans specs runtime/runtime",
    "specs": "specs plans kinds/clear planning/cost",
    "checks": "checks specs plans",
    "kinds/clear kinds/clear_table": "kinds/clear kinds/clear_table edges",
    "kinds/linear kinds/mapped kinds/feature_maps": "kinds/mapped kinds/raw_scale kinds/feature_maps edges",
    "kinds/chunked": "kinds/mapped kinds/raw_scale edges planning/cost",
    "planning/cost": "planning/cost plans",
    "planning/high_res": "planning/high_res",
    "planning/report": "planning/report",
    "planning/knapsack": "planning/budget",
    "students/tensor_file students/file students/fit": "students/tensor_file students/file",
    "atomic_file": "atomic_file",
    "transfer/scores": "transfer/scores",
    "engine/losses": "engine/losses transfer/scores",
    "engine/job_folder": "engine/job_folder",
    "samples/nested": "samples/nested",
    "samples/index": "samples/folder samples/writer",
    "shown": "shown plans specs",
    "hub/model_card": "hub/publish shown",
}  # fmt: skip
TESTS_OF = {module: tests for modules, tests in TESTS.items() for module in modules.split()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the pack's unit tests.")
    parser.add_argument("modules", nargs="*", metavar="module", help=f"one of {', '.join(TESTS_OF)}; default: all")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "linearize"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
        for module in args.modules or TESTS_OF:
            tests = [str(find(pack / "tests", name, "test_")) for name in TESTS_OF[module].split()]
            choice = random.Random(f"{args.seed} {module}")
            outcomes[module] = Counter(outcomes_of(find(pack, module), tests, choice))
    print(f"\n{'module':20} mutants killed survived")
    for module, counts in {**outcomes, "all": sum(outcomes.values(), Counter())}.items():
        print(f"{module:20} {counts.total():7} {counts['killed']:6} {counts['survived']:8}")
    return 0


def find(folder: Path, name: str, prefix: str = "") -> Path:
    room, _, last = name.rpartition("/")
    places = (folder / layer / room / f"{prefix}{last}.py" for layer in ("attention", "training"))
    return next(path for path in places if path.exists())


def outcomes_of(path: Path, tests: list[str], choice: random.Random) -> list[str]:
    """Return what became of each mutant of a module."""
    source, outcomes, start = path.read_text(encoding="utf-8"), [], time.monotonic()
    if not passes(path, tests, 600):
        raise SystemExit(f"the tests of {path.name} fail as it is")
    limit_s = 30 + 10 * (time.monotonic() - start)
    for operator, occurrence in sample(source, choice):
        mutant = mutate_code(source, get_operator(operator)(), occurrence)
        path.write_text(mutant, encoding="utf-8")
        outcomes.append("survived" if passes(path, tests, limit_s) else "killed")
        path.write_text(source, encoding="utf-8")
        print(outcomes[-1], path.stem, operator, occurrence, flush=True)
        if outcomes[-1] == "survived":
            print(*difflib.unified_diff(source.splitlines(), mutant.splitlines(), lineterm="", n=1), sep="\n")
    return outcomes


def sample(source: str, choice: random.Random) -> list[tuple[str, int]]:
    """Draw places of a module at which something can be changed, and for each one operator and its occurrence."""
    places: dict[object, list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        if not get_operator(name).arguments():
            operator = get_operator(name)()
            found = [place for node in nodes for place in operator.mutation_positions(node)]
            for occurrence, place in enumerate(found):
                places.setdefault(place, []).append((name, occurrence))
    drawn, count = [], max(LEAST, round(SHARE * len(places)))
    for place in choice.sample(sorted(places), len(places)):
        name, occurrence = choice.choice(places[place])
        if len(drawn) < count and changes_code(source, mutate_code(source, get_operator(name)(), occurrence)):
            drawn.append((name, occurrence))
    return drawn


def changes_code(source: str, mutant: str) -> bool:
    """Return whether more than annotations and the arguments of decorators differ."""
    try:
        trees = [ast.parse(source), ast.parse(mutant)]
    except SyntaxError:  # for example of ** in a call
        return False
    for node in (node for tree in trees for node in ast.walk(tree)):
        for name in {"annotation", "returns"} & set(node._fields):
            setattr(node, name, None)
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call):
                decorator.keywords = []
    return ast.dump(trees[0]) != ast.dump(trees[1])


def passes(module: Path, tests: list[str], limit_s: float) -> bool:
    """Run tests in a process of their own; what hangs has not passed. Tests that kill processes take too long."""
    # a mutant of the same second and size would not be compiled again
    Path(importlib.util.cache_from_source(str(module))).unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setsid()
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        pack = module.parents[1]
        os.chdir(pack)
        sys.path.insert(0, str(pack.parent))
        os.environ["PYTHONPATH"] = str(pack.parent)
        os._exit(int(pytest.main(["-x", "-q", "-k", "not kills and not process", *tests])))
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    sys.exit(main())
