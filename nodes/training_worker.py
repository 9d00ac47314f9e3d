"""Training on several GPUs from a node: processes of `training/worker.py`, watched through files.

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
from collections.abc import Sequence
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
from ..training.comfyui.worker import WEIGHT_DTYPES
from ..training.engine.job_folder import JobFolder, read_values
from ..training.engine.recipe import FinetuneRecipe, TransferRecipe
from ..training.engine.results import Finished, pack, unpack
from ..training.jobs.description import ModelFile, TrainingJob
from ..training.jobs.progress_file import ProgressReader
from ..training.samples.folder import TeacherSamples
from . import node_status
from .training_run import progress_text

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


def gpus_key(gpus: int) -> dict[str, int]:
    """Return what the number of processes adds to a job's description; one process adds nothing."""
    return {"gpus": gpus} if gpus > 1 else {}


def check_count(gpus: int) -> None:
    """Raise ValueError where the machine has fewer GPUs, or processors, than processes are wanted."""
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    here = (os.cpu_count() or 1) if on_cpu else torch.accelerator.device_count()
    if gpus > here:
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
    words = [word for word, each in WEIGHT_DTYPES.items() if each == (dtype, fast)]
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
    gpus: int,
    model: Any,
    samples: TeacherSamples,
    recipe: TransferRecipe | FinetuneRecipe,
    job: JobFolder,
    node_id: str | None,
    title: str,
    *,
    plans: Sequence[Plan] = (),
    student: Candidates | None = None,
) -> Finished:
    """Return what several processes learned; the job is saved as finished then.

    Args:
        gpus: how many processes, one per GPU.
        model: as its loader gave it.
        samples, recipe: of the job.
        job: its folder, opened; the processes keep theirs inside.
        node_id, title: for progress.
        plans, student: of which the stage takes one.

    Raises:
        ValueError: the model's file is not known, the machine has fewer GPUs, or a process said what was wrong.
        InterruptProcessingException: the user cancelled; the processes saved their state.
    """
    check_count(gpus)
    if samples.live:
        raise ValueError(
            "these samples need their ControlNet beside the model, and other processes do not have it; set gpus to 1"
        )
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    folder = job.path / "worker"
    file = model_file(model)
    folder.mkdir(exist_ok=True)
    given = None
    if student is not None:
        given = folder / "given.safetensors"
        save_student(given, student.student())
    order = TrainingJob(
        model=file, samples=samples.folder.resolve(), recipe=recipe, output=folder / "student.safetensors",
        plans=tuple(plans), student=given, comfyui=Path(folder_paths.__file__).resolve().parent,
        device="cpu" if on_cpu else "auto",
    )  # fmt: skip
    order.write(folder / "job.json")
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    result = _Processes(gpus, order, folder, title, node_id).result()
    job.finish(*pack(result))
    shutil.rmtree(folder, ignore_errors=True)
    return result


def launch_command(count: int, file: Path) -> list[str]:
    """Return the command that starts the processes of a job."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, str(Path(worker.__file__)), str(file)]


def own_words(log: str) -> str:
    """Return what processes wrote before the launcher's report of their end, or all where there is none."""
    lines = log.splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if LAUNCHER.search(line)]
    return "".join(lines[: ends[0]] if ends else lines).strip() or log


class _Processes:
    """The processes of one job, while they run."""

    def __init__(self, count: int, order: TrainingJob, folder: Path, title: str, node_id: str | None) -> None:
        self._total = order.recipe.updates + getattr(order.recipe, "block_updates", 0)
        self._order, self._folder, self._title = order, folder, title
        self._bar = comfy.utils.ProgressBar(self._total, node_id=node_id)
        self._show = node_status.show_on_node(node_id)
        self._problem = self._result = ""
        self._command = launch_command(count, folder / "job.json")
        self._environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_S), "PYTHONFAULTHANDLER": "1"}
        if order.device == "cpu":
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))

    def result(self) -> Finished:
        """Start the processes and return what they learned; see `train_in_processes`."""
        self._show(f"{self._title}: starting processes, which load the model")
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
                    self._show(f"{self._title}: stopping after this update")
                    _stop(process)
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
                self._show(f"{self._title}: {line['status']}")
            elif "update" in line:
                self._bar.update_absolute(line["update"], line["of"])
                self._show(progress_text(self._title, line["update"], line["of"], line["losses"], line["seconds"]))


def _stop(process: subprocess.Popen) -> None:
    """Have the processes save their state and end; on Windows they end at once, with the last saved state."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        process.send_signal(signal.SIGTERM)
    process.wait()
