"""Student files, format `linearize/1`: a plan, learned parameters and weight deltas in one file.

A file holds one spec per site. Nothing here touches a model; `fit.py` says whether a student fits one.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_json, parse_json
from ..kinds.feature_maps import Favor
from ..plans import Plan
from ..shown import one_line, quote, quote_some
from .fingerprint import LENGTH
from .tensor_file import TensorFile, open_tensor_file, problem, write_tensor_file
from .tensor_values import content_sha256

STUDENT_FORMAT = "linearize/1"
FORMAT_NAME = re.compile(r"linearize/[1-9]\d{0,8}", re.ASCII)
ROLES = ("high", "low", "all")
TEXTS = ("host", "role", "pair_id", "base_model", "licence")
METADATA = ("format", *TEXTS, "plan", "recipe", "site_errors")
DRAW = "favor_draw"  # beside METADATA where a feature map is drawn; files without it have the first draw
FINGERPRINT = "fingerprint"
CHECKSUM = "sha256"
MAX_HEADER_BYTES = 2**20  # a thousand tensors take about a tenth
MAX_METADATA_BYTES = MAX_HEADER_BYTES // 2
LONGEST_REASON = 220
MOST_TEXT = 2**16  # characters of what is told about a student; a licence may be quoted whole
MOST_ERROR = 1e300  # a thousand of them can be summed

PARAMETER = re.compile(
    r"(?P<site>\w+(?:\.\w+)*?)\.(?P<part>pool|bias|pool_logits|output\.weight|phi_[qk](?:\.\w+)+)", re.ASCII
)
SHAPES = {  # dimensions of what has a name of its own, and the rule
    "pool": (2, "a pooling weight has as many rows as columns"),
    "pool_logits": (3, "pooling logits have as many rows as columns for each head"),
    "bias": (2, "a bias has a number for each head and level"),
}
DELTA = re.compile(
    r"(?P<target>diffusion_model(?:\.\w+)+)\.(?P<part>lora_(?:up|down|A|B)\.weight|alpha|diff|diff_b|set_weight)",
    re.ASCII,
)
HALVES = {
    "lora_up.weight": "lora_down.weight",
    "lora_down.weight": "lora_up.weight",
    "lora_A.weight": "lora_B.weight",
    "lora_B.weight": "lora_A.weight",
}

Role = Literal["high", "low", "all"]


@dataclass(frozen=True, slots=True, eq=False)
class StudentFile:
    """A distilled student as one file holds it.

    Args:
        host: the architecture, such as "flux"; its plan names the same.
        plan: the spec of every site.
        role: "high" or "low" for one half of a model that is split by noise level, else "all".
        pair_id: what the two halves of such a pair have in common; else empty.
        base_model: name of the model it was distilled from, or empty.
        recipe: how it was trained, values that JSON can hold.
        site_errors: relative error of each site on held-out samples, 0 or more.
        licence: of the weights, or empty.
        fingerprint: (256,) fp32 of the base model, see `attention/students/fingerprint.py`; None if it is not known.
        parameters: `<site>.pool` (d, d), `<site>.phi_q.*` and `<site>.phi_k.*`, `<site>.output.weight` (H, D, D),
            `<site>.bias` (H, levels) and `<site>.pool_logits` (H, s, s) of kind foveated.
        origin: the file it was read from, for records; not stored.
        draw: which fixed draw feature map `favor` has, see `Favor.take_draw`.
        deltas: changes to weights under LoRA keys, `diffusion_model.<path>.lora_up.weight` and its like.

    Raises:
        ValueError: a value contradicts the above; the sentence names it.
    """

    host: str
    plan: Plan
    role: Role = "all"
    pair_id: str = ""
    base_model: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    site_errors: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""
    fingerprint: Tensor | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    origin: str = ""
    draw: int = Favor.DRAW

    def __post_init__(self) -> None:
        for name in TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of a student is a text, got {quote(getattr(self, name))}")
            if len(getattr(self, name)) > MOST_TEXT:
                raise ValueError(f"{name} of a student has at most {MOST_TEXT} characters; shorten it")
        if self.role not in ROLES:
            raise ValueError(f"role of a student is one of {', '.join(ROLES)}, got {quote(self.role)}")
        if self.plan.host != self.host:
            raise ValueError(f"the student is for host {quote(self.host)}, its plan for {quote(self.plan.host)}")
        if self.draw not in range(1, Favor.DRAW + 1):
            raise ValueError(f"feature map favor has draws 1 to {Favor.DRAW}, the student has {quote(self.draw)}")
        _check_site_errors(self.site_errors)
        taken = self.fingerprint
        if taken is not None and (tuple(taken.shape) != (LENGTH,) or taken.dtype != torch.float32):
            raise ValueError(f"a fingerprint is {LENGTH} values in fp32, got {tuple(taken.shape)} in {taken.dtype}")
        for name, tensor in self.parameters.items():
            _check_parameter(name, tensor)
        for name, tensor in self.deltas.items():
            _check_delta(name, tensor, self.deltas)


def _check_site_errors(errors: Mapping[str, float]) -> None:
    for site, error in errors.items():
        if type(error) not in (int, float) or not 0 <= error <= MOST_ERROR:
            raise ValueError(f"site_errors are numbers of 0 or more by site, got {quote(site)}: {quote(error)}")


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"what is learned are floating point numbers, {quote(name)} holds {tensor.dtype}")
    if not tensor.numel():
        raise ValueError(f"{quote(name)} holds no numbers, its shape is {quote(list(tensor.shape))}")


def _check_parameter(name: str, tensor: Tensor) -> None:
    found = PARAMETER.fullmatch(name)
    if found is None or _is_delta(name):
        raise ValueError(
            "a learned parameter is called <site>.pool, .bias, .pool_logits, .output.weight, .phi_q.* or .phi_k.*, got"
            f" {quote(name)}"
        )
    _check_values(name, tensor)
    dimensions, rule = SHAPES.get(found["part"], (tensor.ndim, ""))
    is_square = found["part"] not in ("pool", "pool_logits") or tensor.shape[-2:-1] == tensor.shape[-1:]
    if tensor.ndim != dimensions or not is_square:
        raise ValueError(f"{rule}, {quote(name)} has {tuple(tensor.shape)}")


def _check_delta(name: str, tensor: Tensor, deltas: Mapping[str, Tensor]) -> None:
    found = DELTA.fullmatch(name)
    if found is None:
        raise ValueError(
            f"a weight delta is called diffusion_model.<path> with a LoRA ending ({', '.join(HALVES)}, alpha, diff,"
            f" diff_b or set_weight), got {quote(name)}"
        )
    _check_values(name, tensor)
    target, part = found["target"], found["part"]
    # ComfyUI's loader would take one of several changes of a weight and drop the others
    ways = [way for way in ("lora_up.weight", "lora_A.weight", "diff", "set_weight") if f"{target}.{way}" in deltas]
    if len(ways) > 1:
        raise ValueError(f"a weight is changed in one way, {quote(target)} has {' and '.join(ways)}")
    if part == "alpha":
        if tensor.numel() != 1 or not any(f"{target}.{half}" in deltas for half in HALVES):
            raise ValueError(f"an alpha is one number beside the halves of a LoRA, {quote(name)} is not")
    elif part in HALVES:
        other = f"{target}.{HALVES[part]}"
        if other not in deltas:
            raise ValueError(f"a LoRA has two halves, {quote(name)} comes without {quote(other)}")
        ranks = (tensor, deltas[other]) if part in ("lora_up.weight", "lora_B.weight") else (deltas[other], tensor)
        if (tensor.ndim, deltas[other].ndim) != (2, 2) or ranks[0].shape[1] != ranks[1].shape[0]:
            raise ValueError(f"the halves of a LoRA are matrices of one rank, {quote(name)} and {quote(other)} are not")


def _is_delta(name: str) -> bool:
    return DELTA.fullmatch(name) is not None


def _is_parameter(name: str) -> bool:
    return PARAMETER.fullmatch(name) is not None and not _is_delta(name)


def save_student(path: Path, student: StudentFile, *, replace: bool = True) -> None:
    """Write a student; `path` holds the whole of it or what it held before.

    Args:
        path: of the file.
        student: what it shall hold.
        replace: whether a file there may be replaced.

    Raises:
        FileExistsError: there is a file that may not be replaced.
        ValueError: the recipe is not JSON or too long, a tensor holds NaN or infinity, or the file cannot be written.
    """
    metadata = {"format": STUDENT_FORMAT, **{name: getattr(student, name) for name in TEXTS}}
    metadata["plan"] = json.dumps(student.plan.to_json())
    metadata["site_errors"] = json.dumps(dict(student.site_errors))
    try:
        metadata["recipe"] = json.dumps(dict(student.recipe), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the recipe of a student holds what JSON can hold: {error}") from None
    if is_drawn(student.plan.to_json()):
        metadata[DRAW] = str(student.draw)
    if len(json.dumps(metadata)) > MAX_METADATA_BYTES:
        raise ValueError(f"the texts of a student take at most {MAX_METADATA_BYTES} bytes; shorten its recipe")
    tensors = {**student.parameters, **student.deltas}
    if student.fingerprint is not None:
        tensors[FINGERPRINT] = student.fingerprint
    write_tensor_file(path, tensors, {**metadata, CHECKSUM: _checksum(metadata, tensors)}, replace=replace)


def load_student(path: Path) -> StudentFile:
    """Return the student in a file.

    Raises:
        FileProblem: see `open_tensor_file` and `student_of`.
    """
    return student_of(open_tensor_file(path, max_header_bytes=MAX_HEADER_BYTES))


def student_of(file: TensorFile) -> StudentFile:
    """Return the student in a file that was opened; metadata that the format does not name is ignored.

    Raises:
        FileProblem: it is no student or one of a newer format, a tensor is none of a student's, a value is out of
            range, or contents changed after it was saved (tensors swapped, a bit flipped, metadata edited).
    """
    _check_format(file)
    missing = [name for name in (*METADATA, CHECKSUM) if name not in file.metadata]
    if missing:
        raise problem(
            file.path, f"is not a whole student file: its metadata lacks {', '.join(missing)}; download it again"
        )
    strange = [name for name in file.tensors if not (name == FINGERPRINT or _is_delta(name) or _is_parameter(name))]
    if strange:
        raise problem(
            file.path,
            f"holds {quote_some(strange)}, which no student of format {STUDENT_FORMAT} has; choose another file",
        )
    tensors = file.load(file.tensors)
    if _checksum(file.metadata, tensors) != file.metadata[CHECKSUM]:
        raise problem(file.path, "changed after it was saved, its checksum does not agree; download it again")
    try:
        return _student(file.metadata, tensors)
    except (ValueError, RecursionError) as error:
        reason = "its metadata is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise problem(file.path, f"cannot be used: {one_line(reason, LONGEST_REASON)}") from None


def _check_format(file: TensorFile) -> None:
    version = file.metadata.get("format")
    found = FORMAT_NAME.fullmatch(version or "")
    if found is None:
        told = "its metadata names no format" if version is None else f"its format is {quote(version)}"
        raise problem(
            file.path,
            f"is not a Linearize student, which has format {STUDENT_FORMAT}: {told}; choose a file"
            " that Save Linearized Attention wrote",
        )
    if version != STUDENT_FORMAT:
        raise problem(
            file.path,
            f"is a student of format {version} and this Linearize reads {STUDENT_FORMAT}; install a newer one",
        )


def is_drawn(specs: object) -> bool:
    """Return whether one of some specs, in the plain form of a plan or a result, has a feature map that is drawn."""
    return f'"{Favor.name}"' in json.dumps(specs)


def _student(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> StudentFile:
    plan = Plan.from_text(metadata["plan"])
    draw = metadata.get(DRAW, "1")
    return StudentFile(
        plan=plan,
        draw=(int(draw) if draw.isdecimal() and len(draw) < 4 else 0) if is_drawn(plan.to_json()) else Favor.DRAW,
        recipe=_recipe(metadata["recipe"]),
        site_errors=_json_object("site_errors", metadata["site_errors"]),
        fingerprint=tensors.get(FINGERPRINT),
        parameters={name: tensor for name, tensor in tensors.items() if _is_parameter(name)},
        deltas={name: tensor for name, tensor in tensors.items() if _is_delta(name)},
        **{name: metadata[name] for name in TEXTS},  # pyright: ignore[reportArgumentType]  # role is checked
    )


def unfinished_stages(recipe: Mapping[str, Any]) -> str:
    """Return which stages of training were cancelled and handed on, how far they got; empty if none was."""
    stages = [(name, facts) for name, facts in recipe.items() if isinstance(facts, dict) and "unfinished" in facts]
    return ", ".join(f"{one_line(name)} {one_line(str(facts['unfinished']))}" for name, facts in stages)


def _recipe(text: str) -> dict[str, Any]:
    recipe = _json_object("recipe", text)
    check_json("its recipe", recipe)
    return recipe


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its {name} {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"its {name} is not a JSON object, got {quote(value)}")
    return value


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of what the student is, whatever the order of the file."""
    names = (*METADATA, DRAW) if DRAW in metadata else METADATA
    return content_sha256(tensors, [metadata[name] for name in names])
