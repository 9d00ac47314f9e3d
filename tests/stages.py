"""Run the stages of `python run.py test`, one after another, and print the minutes of each against its budget.

Called by run.py inside .venv. `--only a,b` runs some; `--all` runs the long versions.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINT = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"])
STAGES: tuple[tuple[str, int, list[str]], ...] = (  # name, minutes it may take on two cores, folders (none: LINT)
    ("lint", 1, []),
    ("unit", 3, ["tests/attention", "tests/patching", "tests/repository", "--ignore=tests/attention/hosts"]),
    ("fuzz", 1, ["tests/fuzz"]),
    ("kernels", 7, ["tests/kernels"]),
    ("hosts", 2, ["tests/attention/hosts"]),
    ("nodes", 4, ["tests/nodes"]),
    ("templates", 2, ["tests/templates"]),
    ("benchmarks", 2, ["tests/lab/benchmarks", "tests/lab/evidence"]),
    ("distill", 7, ["tests/training"]),
    ("demo", 2, ["tests/lab/demo", "tests/lab/models"]),
    ("server", 6, ["tests/server"]),
    ("browser", 13, ["tests/browser"]),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run Linearize's tests in stages.")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    names = [name for name, _, _ in STAGES]
    wanted = [name for name in args.only.split(",") if name] or names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        print(f"No test stage {', '.join(unknown)}; the stages are {', '.join(names)}.", file=sys.stderr)
        return 1
    environment = {**os.environ, "LINEARIZE_STRICT": "1", "LINEARIZE_TEST_ALL": "1" if args.all else ""}
    rows = []
    for name, budget, folders in STAGES:
        if name in wanted:
            print(f"\n== {name}", flush=True)
            start = time.monotonic()
            passed = run_stage(folders, environment)
            rows.append((name, (time.monotonic() - start) / 60, budget, passed))
    print("\nstage         minutes  budget")
    for name, minutes, budget, passed in rows:
        print(f"{name:12} {minutes:8.1f} {budget:7}  {'ok' if passed else 'FAILED'}")
    failed = sum(not passed for *_, passed in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def run_stage(folders: list[str], environment: dict[str, str]) -> bool:
    """Return whether a stage passed."""
    if not folders:
        codes = [subprocess.run([sys.executable, "-m", *tool], cwd=ROOT).returncode for tool in LINT]
        return not any(codes)
    # not `python -m pytest`, which would put the checkout, and its nodes/, first on the path
    pytest = Path(sys.executable).with_name("pytest.exe" if os.name == "nt" else "pytest")
    return subprocess.run([str(pytest), "-q", *folders], cwd=ROOT, env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
