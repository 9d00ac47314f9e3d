"""How a run of other processes is watched: one JSON line per update in a file, and who reads what is new in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "progress.jsonl"


class ProgressFile:
    """Appends lines; every line is flushed, so that a reader sees it at once.

    Args:
        folder: of the run; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ProgressReader:
    """Reads what was appended since the last look; what was there before is left out.

    Args:
        folder: of the run; the file may come later.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._place = self._path.stat().st_size if self._path.exists() else 0
        self._rest = b""

    def new(self) -> list[dict[str, Any]]:
        """Return the lines that were finished since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._place)
            text = self._rest + file.read()
            self._place = file.tell()
        *lines, self._rest = text.split(b"\n")
        return [json.loads(line) for line in lines if line]
