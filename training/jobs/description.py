"""Training jobs as files, `linearize/training/1`: what `python -m linearize.training job.json` reads.

A job says what is trained on what, with which recipe, and where the student goes. Nothing is loaded here.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ...attention.atomic_file import whole_file
from ...attention.checks import check_choice, check_object, check_text, parse_json
from ...attention.plans import Plan
from ...attention.shown import quote
from ..engine.recipe import FinetuneRecipe, TransferRecipe

JOB_FORMAT = "linearize/training/1"
RECIPES = {"transfer": TransferRecipe, "finetune": FinetuneRecipe}
MODEL_KINDS = ("diffusion_model", "checkpoint")
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")  # the words of Load Diffusion Model
DEVICES = ("auto", "cpu")
EXTENSION = ".safetensors"
MOST_BYTES = 2**20  # of the file
MOST_PLANS = 64
MOST_PATH = 4096  # characters
REQUIRED = ("format", "stage", "model", "samples", "output")
OPTIONAL = ("plans", "student", "recipe", "comfyui", "device")
Recipe = TypeVar("Recipe", TransferRecipe, FinetuneRecipe)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model as ComfyUI's own loaders take it.

    Args:
        file: of the weights.
        kind: "diffusion_model" as Load Diffusion Model reads it, or "checkpoint" as Load Checkpoint does.
        weight_dtype: of a diffusion model, in the words of that node.

    Raises:
        ValueError: the file is not there, or a word is none of those.
    """

    file: Path
    kind: str = MODEL_KINDS[0]
    weight_dtype: str = WEIGHT_DTYPES[0]

    def __post_init__(self) -> None:
        check_choice("kind of the model", self.kind, MODEL_KINDS)
        check_choice("weight_dtype", self.weight_dtype, WEIGHT_DTYPES)
        if self.kind == "checkpoint" and self.weight_dtype != "default":
            raise ValueError("weight_dtype is of diffusion models; a checkpoint is loaded as it is stored")
        if not self.file.is_file():
            raise ValueError(f"there is no model file {self.file}")


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One job.

    Args:
        model: the teacher.
        samples: folder of its samples.
        recipe: of "transfer" or "finetune"; its `method` is the job's "stage".
        output: the student's file.
        plans: of "transfer": what the sites are to run; several give candidates.
        student: of "finetune": the file of the student that goes in.
        comfyui: ComfyUI's root folder; None for the one that is found, see `comfyui/setup.py`.
        device: "auto", or "cpu".
    """

    model: ModelFile
    samples: Path
    recipe: TransferRecipe | FinetuneRecipe
    output: Path
    plans: tuple[Plan, ...] = ()
    student: Path | None = None
    comfyui: Path | None = None
    device: str = DEVICES[0]

    @property
    def folder(self) -> Path:
        """What belongs to the run: saved states, progress, results; beside the output."""
        return self.output.with_suffix(".job")

    def to_json(self) -> dict[str, Any]:
        """Return the job as a file holds it."""
        data: dict[str, Any] = {
            "format": JOB_FORMAT, "stage": self.recipe.method,
            "model": {"file": str(self.model.file), "kind": self.model.kind, "weight_dtype": self.model.weight_dtype},
            "samples": str(self.samples), "recipe": self.recipe.to_json(), "output": str(self.output),
            "device": self.device,
        }  # fmt: skip
        data |= {"plans": [plan.to_json() for plan in self.plans]} if self.plans else {}
        data |= {"student": str(self.student)} if self.student else {}
        return data | ({"comfyui": str(self.comfyui)} if self.comfyui else {})

    def write(self, path: Path) -> None:
        """Write the file that `read_job` reads."""
        with whole_file(path) as file:
            file.write((json.dumps(self.to_json(), indent=1) + "\n").encode())


def read_job(path: Path) -> TrainingJob:
    """Return the job that a file describes; paths in it are counted from its folder.

    Raises:
        ValueError: the file is missing or no job, or a key or value in it is not as it should be; one sentence.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the job {path} cannot be read: {error.strerror}") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"the job {path} has more than {MOST_BYTES} bytes")
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ValueError(f"the job {path} {error}") from None
    try:
        return job_from_json(data, path.resolve().parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def job_from_json(data: object, folder: Path) -> TrainingJob:
    """Return the job that JSON describes.

    Args:
        folder: from which relative paths are counted.

    Raises:
        ValueError: as `read_job`.
    """
    job = check_object("a job", data, REQUIRED, OPTIONAL)
    if job["format"] != JOB_FORMAT:
        raise ValueError(f"this reads format {JOB_FORMAT}, got {quote(job['format'])}")
    check_choice("stage", job["stage"], RECIPES)
    model = check_object("model", job["model"], ("file",), ("kind", "weight_dtype"))
    words = {name: check_text(name, model[name], MOST_PATH) for name in ("kind", "weight_dtype") if name in model}
    transfer = job["stage"] == "transfer"
    needed, other = ("plans", "student") if transfer else ("student", "plans")
    if needed not in job or other in job:
        raise ValueError(f"a job of stage {job['stage']} has the key {needed} and no key {other}")
    if transfer and not (isinstance(job["plans"], list) and job["plans"]):
        raise ValueError(f"plans is a list of at least one {'linearize/plan/1'} object")
    if transfer and len(job["plans"]) > MOST_PLANS:
        raise ValueError(f"plans are at most {MOST_PLANS}, got {len(job['plans'])}")
    check_choice("device", job.get("device", DEVICES[0]), DEVICES)
    return TrainingJob(
        model=ModelFile(_path(folder, "file of the model", model["file"]), **words),
        samples=_path(folder, "samples", job["samples"]),
        recipe=recipe_from_json(RECIPES[job["stage"]], job.get("recipe", {})),
        output=_output(_path(folder, "output", job["output"])),
        plans=tuple(Plan.from_json(plan) for plan in job["plans"]) if transfer else (),
        student=None if transfer else _path(folder, "student", job["student"]),
        comfyui=_path(folder, "comfyui", job["comfyui"]) if "comfyui" in job else None,
        device=job.get("device", DEVICES[0]),
    )


def recipe_from_json(kind: type[Recipe], data: object) -> Recipe:
    """Return a recipe of which JSON names some values, the others are defaults.

    Raises:
        ValueError: it names a value that the recipe does not have, or one that is out of range.
    """
    names = [field.name for field in fields(kind)]
    found = check_object(f"the recipe of stage {kind.method}", data, (), ("stage", *names))
    if found.get("stage", kind.method) != kind.method:
        raise ValueError(f"the recipe is of stage {quote(found['stage'])}, the job of stage {kind.method}")
    return kind(**{name: value for name, value in found.items() if name != "stage"})


def _path(folder: Path, name: str, value: object) -> Path:
    return folder / Path(check_text(name, value, MOST_PATH)).expanduser()


def _output(path: Path) -> Path:
    return path if path.suffix == EXTENSION else path / f"student{EXTENSION}"
