"""What the nodes that train share: the job of a run on disk, refusals, progress and interrupts on the node.

A job is found again by what it is made of; finished, it answers without the model, unfinished, it goes on.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from .. import patching
from ..patching.patcher import model_fingerprint
from ..training.comfyui.identity import job_digest, model_digest, norms_digest
from ..training.comfyui.teacher import stop_if_interrupted
from ..training.engine.job_folder import JobFolder
from ..training.engine.loop import Losses, Progress, Stage, progress_of, run_stage
from ..training.engine.results import Finished, unpack
from ..training.samples.folder import OTHER_MODEL, TeacherSamples, check_samples
from . import node_status

VERSION = 1  # of what the stages do; a change of results starts every job anew
TEXT_INTERVAL_S = 0.5
_cancelled: list[str] = []


def check_model(model: Any, samples: TeacherSamples) -> str:
    """Return a note on a model and its samples, often empty, after refusing what cannot be trained.

    Raises:
        ValueError: a Linearize node patched the model already, no host knows it, or the samples are another model's.
    """
    host, _ = patching.host_of(model)
    if patching.runtime_of(model) is not None:
        raise ValueError("this model is linearized already; connect the one that goes into the Linearize node")
    found = check_samples(samples, host.name, model_fingerprint(model), model_digest(model))
    return "" if found == "same" else OTHER_MODEL


def job_folder(kind: str, model: Any, samples: TeacherSamples, recipe: Mapping[str, Any], **more: Any) -> JobFolder:
    """Return the folder of a job below ComfyUI's output folder.

    Args:
        kind: of training, such as "transfer".
        model: the teacher.
        samples: its samples.
        recipe: as JSON holds it.
        more: what else the result depends on, as JSON holds it.
    """
    host, _ = patching.host_of(model)
    description = {
        "kind": kind, "version": VERSION, "host": host.name, "model": job_digest(model), "samples": samples.digest,
        "recipe": dict(recipe), **more,
    }  # fmt: skip
    root = Path(folder_paths.get_output_directory()) / "linearize" / "jobs"
    return JobFolder(root, description, {**description, "model": norms_digest(model)})


def run_with_progress(
    stage: Stage,
    job: JobFolder,
    node_id: str | None,
    title: str,
    *,
    preview: Callable[[], Any] | None = None,
    preview_every: int = 0,
) -> Progress:
    """Do the updates of a stage with a progress bar and a status text; an interrupt ends it early.

    Args:
        title: what is trained, for the status text.
        preview: returns a picture as ComfyUI's progress bar takes it, or None.
        preview_every: updates between pictures; 0 makes none.

    Returns:
        How far it got: fewer updates than the stage has mean that the user cancelled. The state is saved then, and the
        stage holds the last finished update.
    """
    bar = comfy.utils.ProgressBar(stage.num_updates, node_id=node_id)
    show = node_status.show_on_node(node_id)
    started = shown = time.monotonic()
    first: list[int] = []

    def watch(done: int, total: int, losses: Losses) -> None:
        nonlocal shown
        now = time.monotonic()
        first.append(done) if not first else None
        picture = preview() if preview is not None and preview_every and done % preview_every == 0 else None
        bar.update_absolute(done, total, picture)
        if now - shown >= TEXT_INTERVAL_S or done == total:
            shown = now
            show(progress_text(title, done, total, losses, (now - started) / (done - first[0] + 1)))
        stop_if_interrupted()

    try:
        return run_stage(stage, job, watch)
    except comfy.model_management.InterruptProcessingException:
        _cancelled.append(title)
        return progress_of(job)


def cancelled_runs() -> int:
    """Return how many runs were cancelled so far: for a node's `fingerprint_inputs`, so that the next run goes on."""
    return len(_cancelled)


def progress_text(title: str, done: int, total: int, losses: Losses, seconds: float) -> str:
    """Return the status of a run: updates, losses, seconds per update."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return f"{title}: update {done} of {total}, {parts}, {seconds:.2g} s per update"


def finished(job: JobFolder) -> Finished | None:
    """Return the result of a finished job, or None."""
    saved = job.result()
    return unpack(*saved) if saved else None
