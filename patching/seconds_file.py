"""Seconds a forward on this machine, from run to run: `seconds.json`, in a folder that ComfyUI serves to nobody.

`{format, models: {model: {size: {kind or "dense": {seconds, at, worked_out}}}}}`; a size is "tokens x batch".
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..attention.atomic_file import whole_file
from ..attention.runtime.record import SLOWER, DenseSeconds, once
from ..attention.runtime.seconds import StepSize

FORMAT = "linearize/seconds/1"
DENSE = "dense"
MOST_SIZES, MOST_KINDS, MOST_BYTES = 200, 20, 2**20


@dataclass(frozen=True, slots=True)
class SecondsFile:
    """The file; one that is not there, or that nobody can read, holds nothing.

    Args:
        path: of the file; None takes the one in ComfyUI's user folder.
    """

    path: Path | None = None

    def dense(self, size: StepSize) -> DenseSeconds | None:
        """Return the last dense seconds of a forward of a model and size."""
        found = self._read().get(size.model, {}).get(_size_key(size), {}).get(DENSE)
        return DenseSeconds(found["seconds"], found["worked_out"]) if found else None

    def note(self, size: StepSize, kind: str, planned: float | None, dense: DenseSeconds | None) -> None:
        """Remember the seconds of a run's forwards; a disk that refuses costs nothing but that."""
        models = self._read()
        own = models.setdefault(size.model, {}).pop(_size_key(size), {})
        if planned is not None:
            own.pop(kind, None)  # the newest stands last
            own[kind] = _entry(planned, worked_out=False)
        if dense is not None:
            own[DENSE] = _entry(dense.seconds, worked_out=dense.worked_out)
        models[size.model][_size_key(size)] = {name: own[name] for name in list(own)[-MOST_KINDS:] if name in own}
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(json.dumps({"format": FORMAT, "models": _newest(models)}, indent=1).encode())
        except OSError as error:
            once.info(f"Linearize: seconds could not be remembered: {type(error).__name__}")

    def break_even(self, model: str, kind: str, least: int) -> int:
        """Return the fewest tokens at which a kind was ever faster than dense here.

        Where it was faster at none, it is `least`, and more than the largest size at which it was slower.
        """
        faster, slower = [], []
        for size, own in self._read().get(model, {}).items():
            if kind in own and DENSE in own:
                tokens = int(size.partition(" x ")[0])
                gains = own[kind]["seconds"] * SLOWER < own[DENSE]["seconds"]
                (faster if gains else slower).append(tokens)
        return min(faster) if faster else max([least, *(tokens + 1 for tokens in slower)])

    def _path(self) -> Path:
        return self.path or Path(folder_paths.get_system_user_directory("linearize")) / "seconds.json"

    def _read(self) -> dict[str, dict[str, dict[str, Any]]]:
        try:
            path = self._path()
            if path.stat().st_size > MOST_BYTES:
                return {}
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                return {}
            return {
                str(model): {size: _checked(own) for size, own in sizes.items() if size.partition(" x ")[0].isdecimal()}
                for model, sizes in stored["models"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return {}


def _size_key(size: StepSize) -> str:
    return f"{size.tokens} x {size.batch}"


def _entry(seconds: float, *, worked_out: bool) -> dict[str, Any]:
    return {"seconds": round(seconds, 5), "at": round(time.time()), "worked_out": worked_out}


def _checked(own: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a size that are what this module writes."""
    found = {}
    for name, each in own.items():
        seconds = float(each["seconds"])
        if math.isfinite(seconds) and seconds > 0:
            found[str(name)] = {"seconds": seconds, "at": int(each["at"]), "worked_out": bool(each["worked_out"])}
    return found


def _newest(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sizes that were noted last."""
    dated = [
        (max((each["at"] for each in own.values()), default=0), model, size)
        for model, sizes in models.items()
        for size, own in sizes.items()
    ]
    kept = {(model, size) for _, model, size in sorted(dated)[-MOST_SIZES:]}
    found = {
        model: {size: own for size, own in sizes.items() if (model, size) in kept} for model, sizes in models.items()
    }
    return {model: sizes for model, sizes in found.items() if sizes}
