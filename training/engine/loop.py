"""The loop that all stages share: update, report, save, resume after a kill, react when memory runs out.

A stage changes nothing but gradients until a whole update is known, so what is saved is always a finished update; a
kill loses at most the one in progress and those since the last save, which the resumed run repeats bit by bit.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .job_folder import JobFolder, Saved

SAVING_SHARE = 0.05  # of the time, at most, goes into saved states
HISTORY = "history."  # in front of the names of losses in a saved state
Losses = Mapping[str, float]
Watch = Callable[[int, int, Losses], None]
Say = Callable[[str], None]  # told what happens between updates, in a few words


def silent(_: str) -> None:
    """Say nothing."""


class Stopped(Exception):
    """A `Watch` raises it to end a run early; what was learned so far is kept."""


class NotFinite(ValueError):
    """An update gave infinities or NaN, and would again: draws repeat. One sentence for the user."""


class Stage(Protocol):
    """Something that is trained update by update: stage 1, or stages 2 and 3 together.

    `num_updates` is how many; `update` does one and returns its losses by name, all finite; `state` and `restore` are
    what a resumed run needs beside the number of the update; `relieve` makes the next try need less memory, says how,
    or returns None if nothing is left to give up.
    """

    num_updates: int

    def update(self, number: int) -> Losses: ...  # noqa: D102
    def state(self) -> dict[str, Tensor]: ...  # noqa: D102
    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...  # noqa: D102
    def relieve(self) -> str | None: ...  # noqa: D102


@dataclass(slots=True)
class Progress:
    """How far a run got.

    Args:
        done: finished updates.
        history: every loss, by name, update by update.
        notes: what was given up for memory, in order.
        problem: why no further update can be made, or empty.
    """

    done: int
    history: dict[str, list[float]]
    notes: list[str]
    problem: str = ""

    def is_over(self, total: int) -> bool:
        """Return whether all of `total` updates are done, or no further one can be done."""
        return self.done >= total or bool(self.problem)


def unfinished(progress: Progress, total: int) -> dict[str, str]:
    """Return what a student's recipe says of a run that was cancelled and handed on; nothing for any other."""
    return {} if progress.is_over(total) else {"unfinished": f"{progress.done} of {total} updates"}


class OutOfMemory(RuntimeError):
    """Memory ran out and nothing is left to give up; one sentence with advice."""


def run_stage(
    stage: Stage,
    job: JobFolder,
    watch: Watch = lambda done, total, losses: None,
    resumed: Callable[[int], None] = lambda done: None,
) -> Progress:
    """Do all updates of a stage, from where the job's last state ended.

    Args:
        watch: told (finished updates, all updates, losses) after each; may raise `Stopped`.
        resumed: told the updates that earlier runs finished, before the first one.

    Returns:
        How far it got: all updates, or fewer where `watch` raised `Stopped`, or an update `NotFinite`.

    Raises:
        OutOfMemory: see there. NotFinite: the first update raised it. BaseException: whatever stopped the run
            otherwise, after its state was saved.
    """
    progress = _resume(stage, job)
    resumed(progress.done)
    saver = _Saver(job, stage, progress)
    while progress.done < stage.num_updates:
        try:
            losses = stage.update(progress.done)
        except torch.OutOfMemoryError as error:
            failure = str(error).splitlines()[0]
        except NotFinite as error:
            if not progress.done:
                raise
            progress.problem = str(error)
            break
        except BaseException:
            saver.save()
            raise
        else:
            progress.done += 1
            for name, value in losses.items():
                progress.history.setdefault(name, []).append(value)
            saver.save_if_cheap()
            try:
                watch(progress.done, stage.num_updates, losses)
            except Stopped:
                saver.save()
                return progress
            except BaseException:
                saver.save()
                raise
            continue
        _relieve(stage, progress, failure)
    saver.save()
    return progress


def _relieve(stage: Stage, progress: Progress, failure: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    note = stage.relieve()
    if note is None:
        raise OutOfMemory(
            f"memory ran out at update {progress.done + 1} ({failure}); train at a smaller size, or with fewer"
            " candidates or a lower rank"
        )
    progress.notes.append(note)


def progress_of(job: JobFolder) -> Progress:
    """Return how far the job's last saved state got; nothing done where there is none."""
    return _progress(job.state())


def _progress(saved: Saved | None) -> Progress:
    if saved is None:
        return Progress(0, {}, [])
    tensors, values = saved
    history = {name: tensors[HISTORY + name].tolist() for name in values["history"]}
    return Progress(values["done"], history, values["notes"])


def _resume(stage: Stage, job: JobFolder) -> Progress:
    saved = job.state()
    progress = _progress(saved)
    if saved is not None:
        stage.restore({name: tensor for name, tensor in saved[0].items() if not name.startswith(HISTORY)})
        for note in progress.notes:
            if stage.relieve() != note:
                break
    return progress


class _Saver:
    """Saves states so often that saving takes a small share of the time."""

    def __init__(self, job: JobFolder, stage: Stage, progress: Progress) -> None:
        self._job, self._stage, self._progress = job, stage, progress
        self._saved_update, self._cost, self._ready = progress.done, 0.0, time.monotonic()

    def save_if_cheap(self) -> None:
        if time.monotonic() >= self._ready:
            self.save()

    def save(self) -> None:
        if self._saved_update == self._progress.done:
            return
        start = time.monotonic()
        history = {name: torch.tensor(values, dtype=torch.float64) for name, values in self._progress.history.items()}
        values = {"done": self._progress.done, "history": list(history), "notes": self._progress.notes}
        tensors = {HISTORY + name: tensor for name, tensor in history.items()}
        self._job.save_state({**self._stage.state(), **tensors}, values)
        self._saved_update, end = self._progress.done, time.monotonic()
        self._ready = end + (end - start) * (1 / SAVING_SHARE - 1)
