"""What the nodes that train share: where jobs lie, progress on the node, and what a cancel does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..attention.words import counted
from ..patching.patcher import stop_if_interrupted
from ..training.engine.loop import Progress, Stage
from ..training.jobs.watch import Update, Watch
from . import node_status

TEXT_INTERVAL_S = 0.5
_cancelled: list[str] = []


class NodeWatch(Watch):
    """Follows a run on a node: a progress bar, a status text, and what ComfyUI's interrupt does.

    An interrupt passes through and ends the prompt, after the job's state was saved.

    Args:
        node_id: of the node.
        title: what is trained, for the status text.
        keep_unfinished: whether an interrupt ends only the updates instead, and what they made is handed on.
    """

    def __init__(self, node_id: str | None, title: str, keep_unfinished: bool = False) -> None:
        super().__init__()
        self.show, self._node_id, self._title = node_status.show_on_node(node_id), node_id, title
        self._shown, self._done, self._total = time.monotonic(), 0, 0
        self.interrupts = (comfy.model_management.InterruptProcessingException,) if keep_unfinished else ()

    def say(self, text: str) -> None:
        self.report(text)
        stop_if_interrupted()

    def begin(self, stage: Stage) -> None:
        self.expect(stage.num_updates)

    def resumed(self, done: int) -> None:
        self._done = done

    def update(self, update: Update) -> None:
        self.tell(update, interval=TEXT_INTERVAL_S)
        stop_if_interrupted()

    def stopped(self, progress: Progress, total: int) -> None:
        """Remember that this run was cancelled and handed on."""
        _cancelled.append(self._title)

    @contextmanager
    def cancel_told(self) -> Iterator[None]:
        """Say on the node how far the run got when an interrupt passes through."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            after = f" after {self._done} of {counted(self._total, 'update')}" if self._total else ""
            self.show(f"cancelled{after}, run again to go on")
            raise

    def report(self, text: str) -> None:
        """Show what is done."""
        self.show(f"{self._title}: {text}")

    def expect(self, total: int) -> None:
        """Begin a progress bar."""
        self._bar, self._shown = comfy.utils.ProgressBar(total, node_id=self._node_id), time.monotonic()
        self._total = total

    def tell(self, update: Update, *, interval: float = 0.0) -> None:
        """Show an update on the bar, and as text where the last text is `interval` seconds old."""
        self._done, self._total = update.done, update.total
        self._bar.update_absolute(update.done, update.total, self.picture(update))
        now = time.monotonic()
        if now - self._shown >= interval or update.done == update.total:
            self._shown = now
            self.report(str(update))

    def picture(self, update: Update) -> Any:
        """Return a picture for an update as ComfyUI's progress bar takes it, or None."""
        return None


def jobs_folder() -> Path:
    """Return the folder of all jobs, below ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / "linearize" / "jobs"


def cancelled_runs() -> int:
    """Return how many unfinished results were handed on: for `fingerprint_inputs`, so that the next run resumes.

    Where a cancel ended the prompt, ComfyUI keeps no result that could stand in for the next run.
    """
    return len(_cancelled)


def keep_unfinished_input() -> Any:
    """Return the input `keep_unfinished`, which the nodes that train share."""
    return io.Boolean.Input(
        "keep_unfinished", default=False, optional=True, advanced=True,
        tooltip="What Cancel does: off, it ends the prompt, and the next run goes on; on, it ends only the updates, "
        "and the student is handed on as far as it came, marked unfinished. With gpus above 1 it always ends the "
        "prompt.",
    )  # fmt: skip
