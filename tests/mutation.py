"""Mutation testing: small faults put into a copy of the pack one at a time, and whether its unit tests notice.

    python -m pip install cosmic-ray==8.7.0
    python tests/mutation.py                         # a sample of all modules in TESTS
    python tests/mutation.py --seed 2 attention/plans.py

Prints a line per mutant, the change of each that survived, and the score. A survivor is a missing test, code that is
not needed, or a change that changes nothing. The checkout itself is never written. Needs `os.fork`: each mutant's tests
start in a process that has PyTorch already. Not part of `run.py test`.
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

import hypothesis  # noqa: F401
import pytest
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.08  # of the places of a module at which something can be changed
LIMIT_S = 120.0
RUNTIME = "runtime plans memory"
CLEAR = "clear clear_table edges"
LINEAR = "linear_kinds raw_scale feature_maps edges"
FILES = "tensor_file student_file"
TESTS = {  # the test files of a module, in tests/attention where no folder is named
    "attention/decisions.py": RUNTIME,
    "attention/runtime.py": RUNTIME,
    "attention/override.py": RUNTIME,
    "attention/record.py": f"record {RUNTIME} training/shown",
    "attention/site_hooks.py": RUNTIME,
    "attention/plans.py": "plans specs runtime",
    "attention/specs.py": "specs plans clear cost",
    "attention/bounds.py": "specs plans edges student_file",
    "attention/clear.py": CLEAR,
    "attention/clear_table.py": "clear_table clear edges",
    "attention/linear.py": LINEAR,
    "attention/chunked.py": LINEAR,
    "attention/feature_maps.py": LINEAR,
    "attention/cost.py": "cost plans",
    "attention/high_res.py": "high_res",
    "attention/report.py": "report",
    "training/losses.py": "training/losses training/scores",
    "training/scores.py": "training/scores",
    "training/budget.py": "training/budget",
    "attention/atomic_file.py": "atomic_file",
    "attention/tensor_file.py": FILES,
    "attention/student_file.py": FILES,
    "attention/student_fit.py": FILES,
    "attention/shown.py": "training/shown plans specs",
    "training/job.py": "training/job",
    "training/sample_index.py": "training/samples training/samples_writer",
    "training/nested.py": "training/nested",
    "training/model_card.py": "training/publish",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the pack's unit tests.")
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "linearize"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
        for module in args.modules:
            outcomes[module] = Counter(mutate(pack, module, random.Random(f"{args.seed} {module}")))
    print(f"\n{'module':30} mutants killed survived")
    for module, counts in {**outcomes, "all": sum(outcomes.values(), Counter())}.items():
        print(f"{module:30} {counts.total():7} {counts['killed']:6} {counts['survived']:8}")
    return 0


def mutate(pack: Path, module: str, choice: random.Random) -> list[str]:
    """Return what became of each mutant of a module."""
    path, source, outcomes = pack / module, (pack / module).read_text(encoding="utf-8"), []
    if not passes(pack, path, TESTS[module]):
        raise SystemExit(f"the tests of {module} fail as it is")
    for operator, occurrence in sample(source, choice):
        path.write_text(mutated := mutate_code(source, get_operator(operator)(), occurrence), encoding="utf-8")
        start = time.monotonic()
        outcomes.append("survived" if passes(pack, path, TESTS[module]) else "killed")
        path.write_text(source, encoding="utf-8")
        print(f"{outcomes[-1]} {module} {operator} {occurrence} ({time.monotonic() - start:.0f} s)", flush=True)
        if outcomes[-1] == "survived":
            print(*difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=1), sep="\n", flush=True)
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
    drawn, count = [], max(4, round(SHARE * len(places)))
    print(len(places), "places", flush=True)
    for place in choice.sample(sorted(places), len(places)):
        each = choice.choice(places[place])
        if len(drawn) < count and changes_code(source, mutate_code(source, get_operator(each[0])(), each[1])):
            drawn.append(each)
    return drawn


def changes_code(source: str, mutated: str) -> bool:
    """Return whether more than annotations and the arguments of decorators differ."""
    try:
        trees = [ast.parse(source), ast.parse(mutated)]
    except SyntaxError:  # for example of ** in a call
        return False
    for tree in trees:
        for node in ast.walk(tree):
            for name in {"annotation", "returns"} & set(node._fields):
                setattr(node, name, None)
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call):
                    decorator.keywords = []
    return ast.dump(trees[0]) != ast.dump(trees[1])


def passes(pack: Path, mutant: Path, tests: str) -> bool:
    """Run tests in a process of their own; what hangs has not passed."""
    Path(importlib.util.cache_from_source(str(mutant))).unlink(missing_ok=True)
    files = [name if "/" in name else f"attention/{name}" for name in tests.split()]
    names = [str(pack / "tests" / f"{folder}/test_{name}.py") for folder, name in (file.split("/") for file in files)]
    child = os.fork()
    if not child:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        os.chdir(pack)
        sys.path.insert(0, str(pack.parent))
        os.environ["PYTHONPATH"] = str(pack.parent)
        os._exit(int(pytest.main(["-x", "-q", "-k", "not kills and not process", *names])))
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            Path(importlib.util.cache_from_source(str(mutant))).unlink(missing_ok=True)
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    sys.exit(main())
