"""A training job on disk: what it is, how far it got, what came out. A kill at any moment leaves it whole.

The folder's name is a hash of the job's description, so the same job finds itself again: finished, it answers at once;
unfinished, it goes on. `state.safetensors` is replaced as a whole; one process at a time owns the folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..attention.tensor_file import open_tensor_file, write_tensor_file

DESCRIPTION = "job.json"
STATE = "state.safetensors"
RESULT = "result.safetensors"
FORMAT = "linearize/job/1"
KEY_LETTERS = 20


class JobProblem(ValueError):
    """A job cannot run or be saved; one sentence for the user."""


def job_key(description: Mapping[str, Any]) -> str:
    """Return the folder name of a job: equal descriptions, that JSON can hold, have equal names."""
    text = json.dumps(description, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LETTERS]


class JobFolder:
    """One job's folder, locked while it is open; use it in a `with` statement.

    Args:
        root: the folder of all jobs; made where it is missing.
        description: what the job is, values that JSON can hold.

    Raises:
        JobProblem: on entering; another process runs this job, or the folder cannot be written.
    """

    def __init__(self, root: Path, description: Mapping[str, Any]) -> None:
        self.description = dict(description)
        self.path = Path(root) / job_key(description)
        self._lock = FileLock(self.path / "lock")

    def __enter__(self) -> "JobFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            for draft in self.path.glob(".*"):  # of a run that was killed while it wrote
                draft.unlink(missing_ok=True)
            _replace(self.path / DESCRIPTION, json.dumps({"format": FORMAT, **self.description}, indent=1))
        except Timeout:
            raise JobProblem(
                f"another run is working on this job, in {self.path}; wait for it, or change a setting"
            ) from None
        except OSError as error:
            self._lock.release()
            raise JobProblem(f"the job folder {self.path} cannot be written: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values of the last saved state, or None if there is none."""
        return self._read(STATE)

    def save_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replace the saved state.

        Raises:
            FileProblem: it could not be written, for example because the disk is full; the state before is still
                there.
        """
        self._write(STATE, tensors, values)

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values of the finished job, or None if it is not finished."""
        return self._read(RESULT)

    def finish(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Save the result and drop the state.

        Raises:
            FileProblem: it could not be written; the state is still there.
        """
        self._write(RESULT, tensors, values)
        (self.path / STATE).unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.path / name
        return read_values(path) if path.exists() else None

    def _write(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        write_tensor_file(self.path / name, tensors, {"format": FORMAT, "values": json.dumps(values)})


def read_values(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and values of a state or a result.

    Raises:
        FileProblem: the file cannot be read.
    """
    file = open_tensor_file(path)
    return file.load(file.tensors), json.loads(file.metadata["values"])


def _replace(path: Path, text: str) -> None:
    """Write a text file; it holds the whole text or what it held before."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)
