"""What the nodes that train share: where jobs lie, progress and interrupts on the node."""

import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from ..training.comfyui.teacher import stop_if_interrupted
from ..training.engine.loop import Progress, Stage
from ..training.jobs.watch import Update, Watch
from . import node_status

TEXT_INTERVAL_S = 0.5
_cancelled: list[str] = []


class NodeWatch(Watch):
    """Follows a run on a node: a progress bar, a status text, and an interrupt that ends the updates early.

    Args:
        node_id: of the node.
        title: what is trained, for the status text.
    """

    interrupts = (comfy.model_management.InterruptProcessingException,)

    def __init__(self, node_id: str | None, title: str) -> None:
        super().__init__()
        self.show, self._node_id, self._title = node_status.show_on_node(node_id), node_id, title
        self._shown = time.monotonic()

    def say(self, text: str) -> None:
        self.report(text)
        stop_if_interrupted()

    def begin(self, stage: Stage) -> None:
        self.expect(stage.num_updates)

    def update(self, update: Update) -> None:
        self.tell(update, interval=TEXT_INTERVAL_S)
        stop_if_interrupted()

    def stopped(self, progress: Progress, total: int) -> None:
        """Remember that this run was cancelled."""
        _cancelled.append(self._title)

    def report(self, text: str) -> None:
        """Show what is done."""
        self.show(f"{self._title}: {text}")

    def expect(self, total: int) -> None:
        """Begin a progress bar."""
        self._bar, self._shown = comfy.utils.ProgressBar(total, node_id=self._node_id), time.monotonic()

    def tell(self, update: Update, *, interval: float = 0.0) -> None:
        """Show an update on the bar, and as text where the last text is `interval` seconds old."""
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
    """Return how many runs were cancelled so far: for a node's `fingerprint_inputs`, so that the next one resumes."""
    return len(_cancelled)
