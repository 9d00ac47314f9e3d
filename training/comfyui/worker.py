"""Training without ComfyUI's server: loads model and samples, runs a job as the nodes do, writes the student.

One process or one of several; see `jobs/distributed.py`. Import it after `setup.prepare`.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from ...attention.shown import one_line
from ...attention.students.candidates import Candidates, decided
from ...attention.students.file import load_student, save_student
from ...attention.students.fit import check_student
from ...patching.patcher import weight_types
from ..engine.job_folder import job_key
from ..engine.loop import Progress
from ..engine.results import Finished, student_digest
from ..jobs.description import ModelFile, TrainingJob
from ..jobs.distributed import ProcessGroup
from ..jobs.progress_file import ProgressFile
from ..jobs.run_job import VERSION, Job, run
from ..jobs.watch import StopSignal, Update, Watch
from ..samples.folder import TeacherSamples
from .identity import model_digest
from .model import ComfyModel

LINE_INTERVAL_S = 5.0
LOADER_OPTIONS: dict[str, tuple[torch.dtype | None, bool]] = {  # what Load Diffusion Model makes of its words
    "default": (None, False), "fp8_e4m3fn": (torch.float8_e4m3fn, False),
    "fp8_e4m3fn_fast": (torch.float8_e4m3fn, True), "fp8_e5m2": (torch.float8_e5m2, False),
}  # fmt: skip
log = logging.getLogger(__name__)


class StoppedEarly(Exception):
    """A signal stopped the run; its state is saved, and the sentence says how far it got."""


def train(file: TrainingJob, workers: ProcessGroup, root: Path | None = None) -> str:
    """Do a job, or the rest of it, and return a text about it. The first process writes the student's file.

    Args:
        file: the job.
        workers: the processes that train together.
        root: the folder of all jobs; None for the one beside the output.

    Raises:
        StoppedEarly: a signal ended it. ValueError: the model, the samples or the student do not go together.
    """
    model = ComfyModel(load_model(file.model))
    samples = TeacherSamples.open(file.samples)
    student, notes = None, [model.check(samples)]
    if file.student is not None:
        loaded = load_student(file.student)
        student, note = decided(Candidates.of_student(loaded, check_student(loaded, model.host.name, model.sites)))
        notes.append(note)
    earlier = earlier_folders(file, model, samples, student, workers.count)
    job = Job(root or file.folder, file.recipe, file.plans, student, workers.count, earlier)
    watch = WorkerWatch(file, notes) if workers.rank == 0 else SilentWatch()
    run(job, model, samples, watch, workers)
    return watch.text


def earlier_folders(
    file: TrainingJob, model: ComfyModel, samples: TeacherSamples, student: Candidates | None, processes: int
) -> tuple[Path, ...]:
    """Return where earlier versions of the worker kept a job's states. The last folder's name is of a version that knew
    a model by its norm weights."""
    described = {
        "kind": file.recipe.method, "version": VERSION, "host": model.host.name,
        "weight_dtype": file.model.weight_dtype, "weights": weight_types(model.patcher), "samples": samples.digest,
        "recipe": file.recipe.to_json(), "plans": [plan.to_json() for plan in file.plans], "processes": processes,
    }  # fmt: skip
    described |= {"student": student_digest(student)} if student else {}
    norms = hashlib.sha256(model.fingerprint.numpy().tobytes()).hexdigest()
    return tuple(
        file.folder / job_key({**described, "model": digest}) for digest in (model_digest(model.patcher), norms)
    )


def load_model(model: ModelFile) -> Any:
    """Return the model patcher that ComfyUI's own loader makes of a file."""
    try:
        if model.kind == "checkpoint":
            return comfy.sd.load_checkpoint_guess_config(str(model.file), output_vae=False, output_clip=False)[0]
        dtype, fast = LOADER_OPTIONS[model.weight_dtype]
        options = {"dtype": dtype} if dtype else {}
        options |= {"fp8_optimizations": True} if fast else {}
        return comfy.sd.load_diffusion_model(str(model.file), model_options=options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the core raises whatever its parsers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"ComfyUI cannot load {model.file} as {model.kind}: {one_line(reason)}") from error


class SilentWatch(Watch):
    """Follows a run without a report; a signal ends the updates."""

    text = ""

    def __init__(self) -> None:
        super().__init__(StopSignal())

    def stopped(self, progress: Progress, total: int) -> None:
        raise StoppedEarly(
            f"stopped after {progress.done} of {total} updates and saved; run the same command again to go on"
        )


class WorkerWatch(SilentWatch):
    """Follows a run in the first process: writes a line of progress for each update, and the student.

    Args:
        file: the job.
        notes: on the job, for the text at its end.
    """

    def __init__(self, file: TrainingJob, notes: Sequence[str]) -> None:
        super().__init__()
        self._file, self._notes, self._progress = file, notes, ProgressFile(file.folder)
        self._logged = float("-inf")

    def say(self, text: str) -> None:
        self._progress.add({"status": text})

    def update(self, update: Update) -> None:
        self._progress.add(update.to_json())
        now = time.monotonic()
        if update.done == update.total or now - self._logged >= LINE_INTERVAL_S:
            self._logged = now
            log.info("%s", update)

    def end(self, result: Finished, file: Path) -> None:
        """Write the student's file. Of a site with several candidates it holds the one of lowest error."""
        student, note = decided(result.candidates)
        self._file.output.parent.mkdir(parents=True, exist_ok=True)
        save_student(self._file.output, student.student())
        self._progress.add({"result": str(file), "student": str(self._file.output)})
        more = [f"{note}; all candidates are in {file}"] if note else []
        lines = [result.text, *self._notes, *more, f"the student is in {self._file.output}"]
        self.text = "\n".join(line for line in lines if line)
