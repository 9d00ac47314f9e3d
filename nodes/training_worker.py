"""Training on several GPUs from a node: starts `training/worker.py` processes and follows their files.

ComfyUI's own process has used its GPU and holds other models, so nothing is forked from it. What the processes get is
the model's file; what nodes did to the model they cannot see, and that is refused.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..attention.plans import Plan
from ..attention.students.candidates import Candidates
from ..attention.students.file import save_student
from ..patching.patcher import is_as_loaded
from ..training import worker
from ..training.comfyui.model import ComfyModel
from ..training.comfyui.worker import LOADER_OPTIONS
from ..training.engine.job_folder import read_values
from ..training.engine.recipe import FinetuneRecipe, TransferRecipe
from ..training.engine.results import Finished, unpack
from ..training.jobs.description import ModelFile, TrainingJob
from ..training.jobs.distributed import ProcessGroup
from ..training.jobs.progress_file import ProgressReader
from ..training.jobs.run_job import Job, finished, open_job, run
from ..training.jobs.watch import Update
from ..training.samples.folder import TeacherSamples
from .training_run import NodeWatch, jobs_folder

POLL_S = 0.2
STOP_S = 600  # what an update may still take after a stop
LOG_CHARACTERS = 2000
# the lines that the launcher logs once a process has failed; torch names the same files when it warns
LAUNCHER = re.compile(r"torch[\\/]distributed[\\/]elastic.*(failed \(exitcode|closing signal)")


def gpus_input() -> Any:
    """Return the input `gpus`, which the nodes that train share."""
    return io.Int.Input(
        "gpus", default=1, min=1, max=64, optional=True, advanced=True,
        tooltip="Above 1, as many processes train together, each on a GPU of this machine (without GPUs: on the "
        "processor) and on samples of its own, and average what they learn. The model has to come straight from "
        "ComfyUI's loader; other models are unloaded. Needs the package accelerate.",
    )  # fmt: skip


def train(
    model: ComfyModel,
    samples: TeacherSamples,
    recipe: TransferRecipe | FinetuneRecipe,
    watch: NodeWatch,
    gpus: int,
    *,
    plans: tuple[Plan, ...] = (),
    student: Candidates | None = None,
) -> Finished:
    """Return what a node's job learned, in this process or in `gpus` of them; see `run_job.run`.

    Args:
        model, samples, recipe: of the job.
        watch: of the node.
        gpus: how many processes train together.
        plans: of Distill Attention.
        student: of Fine-tune Student.

    Raises:
        InterruptProcessingException: the user cancelled; the state is saved.
    """
    job = Job(jobs_folder(), recipe, plans, student, gpus)
    with watch.cancel_told():
        if gpus == 1:
            return run(job, model, samples, watch)
        with open_job(job, model, samples, ProcessGroup()) as folder:
            result = finished(folder)
        # the folder is closed: the processes open it
        return result or train_in_processes(job, model, samples, watch, folder.path / "worker")


def check_count(gpus: int) -> None:
    """Raise ValueError if the machine has fewer GPUs, or processor cores, than the node asks for."""
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    here = (os.cpu_count() or 1) if on_cpu else torch.accelerator.device_count()
    if gpus < 1:
        raise ValueError(f"gpus is 1 or more, got {gpus}")
    if 1 < gpus > here:
        what = "processor cores and no GPU that ComfyUI uses" if on_cpu else "GPU" if here == 1 else "GPUs"
        raise ValueError(f"gpus is {gpus}, this machine has {here} {what}")


def model_file(model: Any) -> ModelFile:
    """Return the file of a model patcher, as its loader read it.

    Raises:
        ValueError: it was not loaded by ComfyUI's own loaders, or nodes changed it since.
    """
    loader, given, *_ = getattr(model, "cached_patcher_init", None) or (None, [])
    from_core = loader in (comfy.sd.load_diffusion_model, comfy.sd.load_checkpoint_guess_config)
    options = dict(given[-1] if loader is comfy.sd.load_diffusion_model else given[6]) if from_core else {}
    dtype, fast = options.pop("dtype", None), bool(options.pop("fp8_optimizations", False))
    words = [word for word, each in LOADER_OPTIONS.items() if each == (dtype, fast)]
    if not from_core or options or not words:
        raise ValueError(
            "training on several GPUs loads the model's file again, and the node that loaded this model does not say "
            "how; load it with ComfyUI's own Load Diffusion Model or Load Checkpoint, or set gpus to 1"
        )
    if not is_as_loaded(model):
        raise ValueError(
            "training on several GPUs loads the model's file again, without what other nodes changed on the model, "
            "such as LoRAs or sampling settings; connect the loader itself, or set gpus to 1"
        )
    kind = "diffusion_model" if loader is comfy.sd.load_diffusion_model else "checkpoint"
    return ModelFile(Path(given[0]), kind, words[0])


def train_in_processes(
    job: Job, model: ComfyModel, samples: TeacherSamples, watch: NodeWatch, folder: Path
) -> Finished:
    """Return what several processes learned; they save states and result in the job's own folder.

    Args:
        job, model, samples: of the run; its loader made the model.
        watch: of the node.
        folder: for what the processes are given and write beside their states; it goes when the job is finished.

    Raises:
        ValueError: the model's file is not known, the machine has fewer GPUs, or a process said what was wrong.
        InterruptProcessingException: the user cancelled; the processes saved their state.
    """
    check_count(job.processes)
    if samples.live:
        raise ValueError(
            "these samples need their ControlNet beside the model, and other processes do not have it; set gpus to 1"
        )
    file = model_file(model.patcher)
    folder.mkdir(exist_ok=True)
    given = None
    if job.student is not None:
        given = folder / "given.safetensors"
        save_student(given, job.student.student())
    order = TrainingJob(
        model=file, samples=samples.folder.resolve(), recipe=job.recipe, output=folder / "student.safetensors",
        plans=job.plans, student=given, comfyui=Path(folder_paths.__file__).resolve().parent,
        device="cpu" if comfy.model_management.get_torch_device().type == "cpu" else "auto",
    )  # fmt: skip
    order.write(folder / "job.json")
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    result = _Processes(job, order, folder, watch).result()
    shutil.rmtree(folder, ignore_errors=True)
    return result


def launch_command(count: int, file: Path, root: Path) -> list[str]:
    """Return the command that starts the processes of a job whose folder is below `root`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, str(Path(worker.__file__)), str(file), str(root)]


def own_words(log: str) -> str:
    """Return what processes wrote before the launcher's report of their end, or all where there is none."""
    lines = log.splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if LAUNCHER.search(line)]
    return "".join(lines[: ends[0]] if ends else lines).strip() or log


class _Processes:
    """The processes of one job, while they run."""

    def __init__(self, job: Job, order: TrainingJob, folder: Path, watch: NodeWatch) -> None:
        watch.expect(job.recipe.updates + getattr(job.recipe, "block_updates", 0))
        self._order, self._folder, self._watch = order, folder, watch
        self._problem = self._result = ""
        self._command = launch_command(job.processes, folder / "job.json", job.root)
        self._environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_S), "PYTHONFAULTHANDLER": "1"}
        if order.device == "cpu":
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // job.processes))

    def result(self) -> Finished:
        """Start the processes and return what they learned; see `train_in_processes`."""
        self._watch.report("starting processes, which load the model")
        log, reader = self._folder / "worker.log", ProgressReader(self._order.folder)
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, cwd=self._folder, env=self._environment
            )
            try:
                while process.poll() is None:
                    self._tell(reader)
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    time.sleep(POLL_S)
            finally:
                if process.poll() is None:
                    self._watch.report("stopping after this update")
                    _stop(process)
                    self._tell(reader)  # the update that was saved last
        self._tell(reader)
        if process.returncode or not self._result:
            raise ValueError(self._problem or (
                f"a process of the training ended with exit code {process.returncode}; the end of {log}:\n"
                f"{own_words(log.read_text(encoding='utf-8', errors='replace'))[-LOG_CHARACTERS:]}"
            ))  # fmt: skip
        return unpack(*read_values(Path(self._result)))

    def _tell(self, reader: ProgressReader) -> None:
        for line in reader.new():
            self._problem = line.get("problem", self._problem)
            self._result = line.get("result", self._result)
            if "status" in line:
                self._watch.report(line["status"])
            elif "update" in line:
                self._watch.tell(Update.from_json(line))


def _stop(process: subprocess.Popen) -> None:
    """Have the processes save their state and end; on Windows they end at once, with the last saved state."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        process.send_signal(signal.SIGTERM)
    process.wait()
