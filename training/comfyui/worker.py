"""Training without ComfyUI's server: loads model and samples, runs a stage as the nodes do, writes the student.

One process or one of several; see `distributed.py`. Import it after `comfy_setup.prepare`.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ...attention.shown import one_line
from ...attention.specs import SiteSpec
from ...attention.students.candidates import Candidates, decided
from ...attention.students.file import load_student, save_student
from ...attention.students.fit import check_student
from ...patching.patcher import host_of, model_fingerprint, weight_types
from ..engine.job_folder import RESULT, JobFolder
from ..engine.loop import Losses, Progress, Stage, Stopped, run_stage
from ..engine.recipe import TransferRecipe
from ..engine.results import Finished, student_digest, unpack
from ..jobs.description import ModelFile, TrainingJob
from ..jobs.distributed import Joint, StopSignal, Together, shared_job
from ..jobs.progress_file import ProgressFile
from ..jobs.runs import resolved_plans, run_finetune, run_transfer
from ..samples.folder import OTHER_MODEL, TeacherSamples, check_samples
from .identity import model_digest
from .teacher import with_teacher
from .trainee import with_trainee

VERSION = 1  # of what the stages do; a change of results starts every job anew
LINE_INTERVAL_S = 5.0
WEIGHT_DTYPES: dict[str, tuple[torch.dtype | None, bool]] = {  # what Load Diffusion Model makes of its words
    "default": (None, False), "fp8_e4m3fn": (torch.float8_e4m3fn, False),
    "fp8_e4m3fn_fast": (torch.float8_e4m3fn, True), "fp8_e5m2": (torch.float8_e5m2, False),
}  # fmt: skip
log = logging.getLogger(__name__)


class StoppedEarly(Exception):
    """The run was told to stop; its state is saved, and the sentence says how far it got."""


def train(job: TrainingJob, workers: Together) -> str:
    """Do a job, or what is left of it; return what is said of it. The student's file is written by the first process.

    Raises:
        StoppedEarly: a signal ended it. ValueError: the model, the samples or the student do not go together.
    """
    model = load_model(job.model)
    samples = TeacherSamples.open(job.samples)
    fingerprint = model_fingerprint(model)
    host, module = host_of(model)
    digest = model_digest(model)
    kinship = check_samples(samples, host.name, fingerprint, digest)
    sites = host.sites(module)
    specs: Sequence[Mapping[str, SiteSpec]] = ()
    student, notes = None, [OTHER_MODEL] if kinship != "same" else []
    description = describe(job, host.name, model, digest, samples, workers)
    if job.student is None:
        specs = resolved_plans(host, sites, job.plans)
    else:
        file = load_student(job.student)
        student, note = decided(Candidates.of_student(file, check_student(file, host.name, sites)))
        notes += [note] if note else []
        description["student"] = student_digest(student)
    device = comfy.model_management.get_torch_device()
    # earlier versions knew a model by its norm weights
    norms = hashlib.sha256(fingerprint.numpy().tobytes()).hexdigest()
    with shared_job(job.folder, description, workers, {**description, "model": norms}) as folder:
        saved = folder.result()
        if saved:
            result = unpack(*saved)
        else:
            updates = Updates(job, folder, workers)
            more: dict[str, Any] = {"device": device, "workers": workers, "say": updates.say}
            if isinstance(job.recipe, TransferRecipe):
                recipe = job.recipe
                result = with_teacher(model, samples, lambda teacher: run_transfer(
                    teacher, samples, fingerprint, specs, recipe, folder, updates, **more))  # fmt: skip
            else:
                recipe, start = job.recipe, student
                assert start is not None
                result = with_trainee(model, samples, lambda trainee: run_finetune(
                    trainee, samples, fingerprint, start, recipe, folder, updates, **more))  # fmt: skip
        return write_student(job, folder, result, notes) if workers.rank == 0 else ""


def load_model(model: ModelFile) -> Any:
    """Return the model patcher that ComfyUI's own loader makes of a file."""
    try:
        if model.kind == "checkpoint":
            return comfy.sd.load_checkpoint_guess_config(str(model.file), output_vae=False, output_clip=False)[0]
        dtype, fast = WEIGHT_DTYPES[model.weight_dtype]
        options = {"dtype": dtype} if dtype else {}
        options |= {"fp8_optimizations": True} if fast else {}
        return comfy.sd.load_diffusion_model(str(model.file), model_options=options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the core raises whatever its parsers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"ComfyUI cannot load {model.file} as {model.kind}: {one_line(reason)}") from error


def describe(
    job: TrainingJob, host: str, model: Any, digest: str, samples: TeacherSamples, workers: Together
) -> dict[str, Any]:
    """Return what a job's saved state depends on, as JSON holds it."""
    return {
        "kind": job.recipe.stage, "version": VERSION, "host": host, "weight_dtype": job.model.weight_dtype,
        "model": digest, "weights": weight_types(model),
        "samples": samples.digest,
        "recipe": job.recipe.to_json(), "plans": [plan.to_json() for plan in job.plans], "processes": workers.count,
    }  # fmt: skip


class Updates:
    """Does a stage's updates: a line of progress each, states saved, signals heeded.

    Args:
        job: for its folder, where the progress goes.
        folder: of its states.
        workers: the processes that train together.
    """

    def __init__(self, job: TrainingJob, folder: JobFolder, workers: Together) -> None:
        self._folder, self._workers = folder, workers
        self._file = ProgressFile(job.folder) if workers.rank == 0 else None
        self._started = self._told = time.monotonic()
        self._first = 0

    def __call__(self, stage: Stage) -> Progress:
        """Return the progress of a run that did all updates that can be done.

        Raises:
            StoppedEarly: it did not.
        """
        self._started = time.monotonic()
        with StopSignal() as stop:
            joint = Joint(stage, self._workers, stop)

            def watch(done: int, total: int, losses: Losses) -> None:
                self._tell(done, total, losses)
                if joint.stopping and done < total:
                    raise Stopped

            progress = run_stage(joint, self._folder, watch)
        # what comes after the updates takes its time too
        if stop.is_set or joint.stopping or not progress.is_over(stage.num_updates):
            raise StoppedEarly(
                f"stopped after {progress.done} of {stage.num_updates} updates and saved; run the same command again "
                "to go on"
            )
        return progress

    def say(self, text: str) -> None:
        """Tell who watches what is done between updates."""
        if self._file is not None:
            self._file.add({"status": text})

    def _tell(self, done: int, total: int, losses: Losses) -> None:
        if self._file is None:
            return
        now = time.monotonic()
        self._first = self._first or done
        seconds = (now - self._started) / (done - self._first + 1)
        self._file.add({"update": done, "of": total, "losses": dict(losses), "seconds": round(seconds, 4)})
        if done in (self._first, total) or now - self._told >= LINE_INTERVAL_S:
            self._told = now
            parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            log.info("update %d of %d, %s, %.2g s per update", done, total, parts, seconds)


def write_student(job: TrainingJob, folder: JobFolder, result: Finished, notes: Sequence[str]) -> str:
    """Write the student's file; return what is said of the job.

    Where sites have several candidates the file holds the one of lowest error each, and the result has them all.
    """
    student, note = decided(result.candidates)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    save_student(job.output, student.student())
    ProgressFile(job.folder).add({"result": str(folder.path / RESULT), "student": str(job.output)})
    more = [f"{note}; all candidates are in {folder.path / RESULT}"] if note else []
    return "\n".join([result.text, *notes, *more, f"the student is in {job.output}"])
