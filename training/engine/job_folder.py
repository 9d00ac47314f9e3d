"""A training job on disk: description, progress and result. A kill at any moment leaves it whole.

The folder's name is a hash of the job's description, so the same job finds itself again: finished, it answers at once;
unfinished, it is resumed. One process at a time owns the folder.

A state is followed by the next one, and then kept until the one after: two are there at most, and a third while it is
written. A finished job has its result and the last state. Each carries a checksum; a damaged one is renamed, and what
came before it is taken.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ...attention.atomic_file import clear_drafts, whole_file
from ...attention.checks import json_or_none
from ...attention.students.tensor_file import FileProblem, open_tensor_file, problem, write_tensor_file
from ...attention.students.tensor_values import content_sha256

DESCRIPTION = "job.json"
STATE = "state.safetensors"
STATE_BEFORE = "state_before.safetensors"
RESULT = "result.safetensors"
SAVED = (RESULT, STATE, STATE_BEFORE)
FORMAT = "linearize/job/1"
KEY_LETTERS = 20
MAX_HEADER_BYTES = 64 * 2**20  # of the pack's own files: many candidates have many tensors
Saved = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and values
log = logging.getLogger(__name__)


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
        earlier: folders in which earlier versions kept this job; the first that is there is taken over, unless this
            folder holds something already.

    Raises:
        JobProblem: on entering; another process runs this job, or the folder cannot be written.
    """

    def __init__(self, root: Path, description: Mapping[str, Any], earlier: Sequence[Path] = ()) -> None:
        self.description = dict(description)
        self.path = Path(root) / job_key(description)
        self.notes: list[str] = []  # what was set aside, for people
        self._earlier = tuple(earlier)
        self._lock = FileLock(self.path / "lock")

    def __enter__(self) -> "JobFolder":
        try:
            earlier = next((folder for folder in self._earlier if folder.is_dir()), None)
            if earlier is not None and not self.path.exists():
                self._take_over(earlier, earlier)  # before it is renamed: after a kill the next run does it again
                earlier.rename(self.path)
                earlier = None
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            clear_drafts(self.path, 0)
            for draft in self.path.glob(f".{DESCRIPTION}.*"):  # of an earlier version that was killed while it wrote
                draft.unlink(missing_ok=True)
            with whole_file(self.path / DESCRIPTION) as file:
                file.write((json.dumps({"format": FORMAT, **self.description}, indent=1) + "\n").encode())
            if earlier is not None and not any((self.path / name).exists() for name in SAVED):
                self._take_over(earlier, self.path)
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

    def _take_over(self, earlier: Path, folder: Path) -> None:
        """Write what an earlier version saved of this job into a folder, under this job's name."""
        for name in SAVED:
            try:
                saved = read_values(earlier / name)
            except FileProblem:  # not there, or damaged: then it stays where it is
                continue
            self._write(name, *saved, folder=folder)

    def state(self) -> Saved | None:
        """Return tensors and values of the last state that is whole, or None if there is none."""
        found = self._read(STATE, "goes on from the state before, if there is one")
        return found or self._read(STATE_BEFORE, "starts anew")

    def save_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Save a state; the one before is kept.

        Raises:
            FileProblem: it could not be written, for example because the disk is full; the states before are still
                there.
        """
        state, before = self.path / STATE, self.path / STATE_BEFORE
        if state.exists() and shutil.disk_usage(self.path).free < 2 * state.stat().st_size:
            before.unlink(missing_ok=True)  # where three do not fit, there are two while one is written
        self._write(STATE, tensors, values, before=before)

    def result(self) -> Saved | None:
        """Return tensors and values of the finished job, or None if it is not finished."""
        return self._read(RESULT, "goes on from its last state, if there is one")

    def finish(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Save the result and drop all states but the last.

        Raises:
            FileProblem: it could not be written; the states are still there.
        """
        self._write(RESULT, tensors, values)
        (self.path / STATE_BEFORE).unlink(missing_ok=True)

    def _read(self, name: str, otherwise: str) -> Saved | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return _read_saved(path, self.path.name)
        except FileProblem as fault:
            self._set_aside(path, f"in the job's folder {self.path}, {fault}; the run {otherwise}")
            return None

    def _set_aside(self, path: Path, reason: str) -> None:
        number = 1
        while (aside := path.with_name(f"damaged_{number}_{path.name}")).exists():
            number += 1
        try:
            path.rename(aside)
        except OSError as error:
            raise JobProblem(f"{reason}; delete that file, it cannot be set aside: {error.strerror}") from None
        self.notes.append(f"{reason}; it was set aside as {aside.name}")
        log.warning("%s", self.notes[-1])

    def _write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        *,
        before: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        facts = {"values": json.dumps(values), "job": self.path.name, "part": _part(name)}
        metadata = {"format": FORMAT, **facts, "sha256": content_sha256(tensors, facts)}
        write_tensor_file((folder or self.path) / name, tensors, metadata, before=before)


def read_values(path: Path) -> Saved:
    """Return tensors and values of a state or a result.

    Raises:
        FileProblem: the file cannot be read, or changed after it was saved.
    """
    return _read_saved(path, None)


def _read_saved(path: Path, job: str | None) -> Saved:
    """Return what a file of a job holds, after comparing its checksum; files of earlier versions have none.

    Args:
        path: of the file, its name as it was written.
        job: whose file it has to be, None for any.

    Raises:
        FileProblem: as `read_values`, or it is another job's.
    """
    file = open_tensor_file(path, max_header_bytes=MAX_HEADER_BYTES)
    tensors, values = file.load(file.tensors), json_or_none(file.metadata.get("values", ""))
    if file.metadata.get("format") != FORMAT or not isinstance(values, dict):
        raise problem(path, "is no file of a training job")
    if "sha256" not in file.metadata:
        return tensors, values
    facts = {name: file.metadata.get(name, "") for name in ("values", "job", "part")}
    if content_sha256(tensors, facts) != file.metadata["sha256"]:
        raise problem(path, "changed after it was saved, its checksum does not agree")
    if facts["job"] != (job or facts["job"]) or facts["part"] != _part(path.name):
        raise problem(path, f"is the {facts['part']} of job {facts['job']}, not what was saved under this name")
    return tensors, values


def _part(name: str) -> str:
    return Path(RESULT if name == RESULT else STATE).stem
