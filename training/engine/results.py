"""The result of a training job as tensors and values for a file: candidates, losses, a text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.plans import describe_sites
from ...attention.spec_json import spec_from_json, spec_to_json
from ...attention.students.candidates import Candidate, Candidates
from ...attention.students.file import is_drawn
from ...attention.students.tensor_values import below, content_sha256

PARAMETER, DELTA, HISTORY, FINGERPRINT = "parameter.", "delta.", "history.", "fingerprint"
TEXTS = ("host", "base_model", "licence", "role", "pair_id")


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A finished job.

    Args:
        candidates: what was learned.
        history: every loss, by name, update by update.
        text: what the node says about it.
    """

    candidates: Candidates
    history: Mapping[str, list[float]]
    text: str


def pack(result: Finished) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a result as tensors and as values that JSON can hold."""
    found = result.candidates
    tensors: dict[str, Tensor] = {DELTA + name: tensor for name, tensor in found.deltas.items()}
    sites: dict[str, list[dict[str, Any]]] = {}
    for site, candidates in found.sites.items():
        sites[site] = [{"spec": spec_to_json(each.spec), "error": json_number(each.error)} for each in candidates]
        for number, each in enumerate(candidates):
            tensors |= {f"{PARAMETER}{site}/{number}/{name}": tensor for name, tensor in each.parameters.items()}
    tensors |= {HISTORY + name: torch.tensor(values, dtype=torch.float64) for name, values in result.history.items()}
    if found.fingerprint is not None:
        tensors[FINGERPRINT] = found.fingerprint
    values = {name: getattr(found, name) for name in TEXTS}
    return tensors, {**values, "draw": found.draw, "sites": sites, "recipe": dict(found.recipe), "text": result.text,
                     "history": list(result.history)}  # fmt: skip


def unpack(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Finished:
    """Return the result that `pack` took apart."""
    sites = {}
    for site, entries in values["sites"].items():
        sites[site] = tuple(
            Candidate(
                spec_from_json(entry["spec"]),
                math.nan if entry["error"] is None else entry["error"],
                below(f"{PARAMETER}{site}/{number}/", tensors),
            )
            for number, entry in enumerate(entries)
        )
    candidates = Candidates(
        **{name: values[name] for name in TEXTS},
        sites=sites,
        recipe=values["recipe"],
        fingerprint=tensors.get(FINGERPRINT),
        deltas=below(DELTA, tensors),
        draw=values.get("draw", 1),  # a job that ended before there were two
    )
    return Finished(candidates, {name: tensors[HISTORY + name].tolist() for name in values["history"]}, values["text"])


def student_digest(student: Candidates) -> str:
    """Return a hash of a student, which jobs are named after.

    Its draw counts where it matters and is not the first: earlier versions had that one, and no word for it.
    """
    tensors, values = pack(Finished(student, {}, ""))
    if student.draw == 1 or not is_drawn(values["sites"]):
        del values["draw"]
    return content_sha256(tensors, values)


def json_number(value: float) -> float | None:
    """Return a number as JSON has it: None for infinities and NaN."""
    return value if math.isfinite(value) else None


def unmeasured(sites: Sequence[str]) -> list[str]:
    """Return a line that names sites whose error is infinite or NaN; none where there are none."""
    if not sites:
        return []
    return [f"could not be measured, because values there are infinite or NaN: {describe_sites(sites)}"]
