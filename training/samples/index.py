"""Which samples a folder holds and how they were made: `about.json` and `index.jsonl`, checked."""

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...attention.checks import MOST_SEED, check_whole, json_or_none
from ...attention.shown import one_line, quote
from ...attention.students.fingerprint import LENGTH, distance, match
from .conditioning import CONDITIONING_FILE
from .files import FORMAT, NODE, SamplesProblem

ABOUT, INDEX, LATENTS = "about.json", "index.jsonl", "latents"
MOST_SAMPLES = 10**6  # as many as six digits number
MOST_STEPS, MOST_CFG, MOST_TEXT = 10**5, 1e6, 1000
MOST_NORM = 1e30
MOST_DIMS, MOST_NUMBERS = 8, 2**31  # of a latent
OTHER = "model is another one: other weights, LoRAs or noise levels, or the same weights in another dtype"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class About:
    """How all samples of a folder were made.

    Args:
        host: name of the model's host.
        fingerprint: (256,) fp32 of the base model, see `attention/students/fingerprint.py`.
        latent_shape: of every sample, with its batch of 1.
        sampler, scheduler, steps, cfg: as ComfyUI's KSampler takes them.
        guidance: that was given to models with guidance embedded; 0 leaves what the conditioning or the model says.
        seeds: samples per prompt.
        first_seed: of sample 0; sample k has first_seed + k.
        base_model: name of the model's file, or empty.
        model: digest of the model's weights, LoRAs and noise levels, or empty where an earlier version took none.
    """

    host: str
    fingerprint: Tensor
    latent_shape: tuple[int, ...]
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    guidance: float
    seeds: int
    first_seed: int
    base_model: str = ""
    model: str = ""

    @property
    def uses_negative(self) -> bool:
        """Whether the negative prompt counts; at cfg 1 ComfyUI leaves it out."""
        return not math.isclose(self.cfg, 1.0)

    def seed(self, number: int) -> int:
        """Return the seed of a sample."""
        return (self.first_seed + number) % 2**64

    def differences(self, other: "About") -> list[str]:
        """Return what is set otherwise in `other`, as "steps is 20 there and 4 here"; the model's name may differ."""
        names = [each.name for each in fields(self) if each.name not in ("fingerprint", "base_model", "model")]
        found = [
            f"{name} is {one_line(getattr(other, name))} there and {one_line(getattr(self, name))} here"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        if found:
            return found
        if self.model and other.model:
            return [OTHER] if self.model != other.model else []
        if match(self.fingerprint, other.fingerprint) != "same":
            found.append(f"model is another one (norms {distance(self.fingerprint, other.fingerprint):.0%} apart)")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return it as `about.json` holds it."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if not self.model:
            del values["model"]  # folders of earlier versions keep their digest
        return {
            "format": FORMAT,
            **values,
            "latent_shape": list(self.latent_shape),
            "fingerprint": self.fingerprint.tolist(),
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the index.

    Args:
        number: of the sample, from 0; prompt index x seeds + seed index.
        prompt: its text, empty where the conditioning came ready.
        seed: of its noise.
        shape: of its latent.
        latent: file of its latent, below the folder.
        sha256: of the latent's contents.
        positive, negative: files of its conditionings; no negative where cfg is 1.
    """

    number: int
    prompt: str
    seed: int
    shape: tuple[int, ...]
    latent: str
    sha256: str
    positive: str
    negative: str | None

    def line(self) -> bytes:
        """Return it as a line of the index."""
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"


def read_about(folder: Path) -> About:
    """Return how a folder's samples were made.

    Raises:
        SamplesProblem: the file cannot be read or says something impossible.
    """
    try:
        data = json_or_none((folder / ABOUT).read_bytes())
    except OSError as error:
        raise SamplesProblem(f"{folder / ABOUT} cannot be read: {error.strerror or error}") from None
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != FORMAT:
        raise SamplesProblem(f"{folder / ABOUT} has format {quote(found)}, this version reads {FORMAT}")
    try:
        return _about(data)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SamplesProblem(f"{folder / ABOUT} is damaged ({quote(str(error))}); choose a new name") from None


def _about(data: dict[str, Any]) -> About:
    kinds = {"latent_shape": list, "fingerprint": list, "cfg": float, "guidance": float}
    kinds |= dict.fromkeys(("steps", "seeds", "first_seed"), int)
    taken: dict[str, Any] = {}
    for each in fields(About):
        if each.name == "model" and each.name not in data:
            continue
        value, kind = data[each.name], kinds.get(each.name, str)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or (kind is float and not 0 <= value <= MOST_CFG):
            raise ValueError(f"{each.name} is {quote(value)}")
        if isinstance(value, str) and len(value) > MOST_TEXT:
            raise ValueError(f"{each.name} has {len(value)} characters")
        taken[each.name] = value
    if not _is_shape(taken["latent_shape"]):
        raise ValueError("latent_shape is no shape")
    if "model" in taken and not SHA256.fullmatch(taken["model"]):
        raise ValueError(f"model is {quote(taken['model'])}")
    taken["latent_shape"] = tuple(taken["latent_shape"])
    for name, least, most in (("steps", 1, MOST_STEPS), ("seeds", 1, MOST_SAMPLES), ("first_seed", 0, MOST_SEED)):
        check_whole(name, taken[name], least, most)
    values = taken["fingerprint"]
    if len(values) != LENGTH or not all(type(value) in (int, float) and abs(value) < MOST_NORM for value in values):
        raise ValueError(f"fingerprint has not {LENGTH} values that are numbers")
    taken["fingerprint"] = torch.tensor(values, dtype=torch.float32)
    return About(**taken)


def read_index(folder: Path, about: About) -> tuple[dict[int, Sample], bool]:
    """Return the samples that the index lists, by number, and whether it ends in a torn line (which does not count).

    Raises:
        SamplesProblem: the index cannot be read, a line before the last is damaged, or two lines contradict each other.
    """
    try:
        lines = (folder / INDEX).read_bytes().split(b"\n") if (folder / INDEX).exists() else [b""]
    except OSError as error:
        raise SamplesProblem(f"{folder / INDEX} cannot be read: {error.strerror or error}") from None
    found: dict[int, Sample] = {}
    last = len(lines) - 2  # behind it comes what a kill cut off, or nothing
    for place, line in enumerate(lines[:-1]):
        sample = _sample(json_or_none(line), about)
        if sample is None and place == last:
            return found, True
        if sample is None or found.setdefault(sample.number, sample) != sample:
            raise SamplesProblem(
                f"line {place + 1} of {folder / INDEX} is damaged; delete it, and run {NODE} again to make it anew"
            )
    return found, lines[-1] != b""


def _sample(data: Any, about: About) -> Sample | None:
    """Return the sample of a line, None where it is none of this folder's."""
    if not isinstance(data, dict) or set(data) != {each.name for each in fields(Sample)}:
        return None
    number, shape, negative = data["number"], data["shape"], data["negative"]
    whole = all(type(data[name]) is int and 0 <= data[name] <= MOST_SEED for name in ("number", "seed"))
    whole = whole and number < MOST_SAMPLES
    texts = all(isinstance(data[name], str) for name in ("prompt", "latent", "sha256", "positive"))
    if not (whole and texts and _is_shape(shape) and tuple(shape) == about.latent_shape):
        return None
    if data["latent"] != latent_file(number) or data["seed"] != about.seed(number):
        return None
    files = [data["positive"], *([] if negative is None else [negative])]
    named = all(isinstance(file, str) and CONDITIONING_FILE.fullmatch(file) for file in files)
    return Sample(**{**data, "shape": tuple(shape)}) if named and SHA256.fullmatch(data["sha256"]) else None


def latent_file(number: int) -> str:
    """Return the name of a sample's latent, below the folder."""
    return f"{LATENTS}/{number:06d}.safetensors"


def has_files(folder: Path, sample: Sample) -> bool:
    """Return whether the files of a sample are there; none is opened."""
    return all((folder / file).is_file() for file in (sample.latent, sample.positive, sample.negative) if file)


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or not 3 <= len(value) <= MOST_DIMS:
        return False
    return all(type(size) is int and size > 0 for size in value) and math.prod(value) <= MOST_NUMBERS
