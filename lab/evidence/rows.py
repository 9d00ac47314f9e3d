"""The stored rows: read, and appended whole."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from .. import ROOT

RESULTS, COSTS, UNTRAINED, CALIBRATED = (
    ROOT / "lab" / "evidence" / f"{name}.csv" for name in ("results", "costs", "untrained", "calibrated")
)
LOCKS = ROOT / ".comfyui" / "evidence"
SHOWN_SUITES = {"curve": ("recipes", "curve"), "levels": ("methods",)}  # by figures that have no suite's name


def stored() -> list[dict[str, str]]:
    """Return the rows of results.csv."""
    return rows_of(RESULTS)


def costs() -> list[dict[str, str]]:
    """Return the rows of costs.csv."""
    return rows_of(COSTS)


def digest(figure: str) -> str:
    """Return what changes with any row that a figure shows; each figure carries that of the rows it was drawn from."""
    if figure in ("costs", "untrained"):
        shown = rows_of(COSTS if figure == "costs" else UNTRAINED)
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    suites = SHOWN_SUITES.get(figure, (figure.replace("_", " "),))
    shown = [row for row in stored() if row["suite"] in suites]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Store rows behind those of a file; what a kill left of a line is taken away first."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with FileLock(LOCKS / f"{path.stem}.lock"), path.open("a+b") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        if not text:
            writer.writeheader()
        writer.writerows(rows)
        file.write(lines.getvalue().encode())
