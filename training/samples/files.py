"""What all files of a samples folder share: their format, how tensors are stored, the error."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...attention.checks import json_or_none
from ...attention.students.tensor_file import open_tensor_file, write_tensor_file

FORMAT = "linearize/samples/1"
NODE = "Generate Teacher Samples"


class SamplesProblem(ValueError):
    """Samples that cannot be read, used or made; the message is one sentence."""


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and values of a file of a samples folder, as normal tensors, not those of inference mode.

    Raises:
        ValueError: it cannot be read, or is another kind of file; one sentence.
    """
    file = open_tensor_file(path)
    values = json_or_none(file.metadata.get("values", ""))
    if file.metadata.get("format") != FORMAT or not isinstance(values, dict):
        raise unknown_file(path)
    with torch.inference_mode(False):  # a trainer saves these tensors for its backward pass
        return file.load(file.tensors), values


def unknown_file(path: Path) -> SamplesProblem:
    """Return the error for a file of another kind."""
    return SamplesProblem(f"{path} is no file of teacher samples; delete it, and run {NODE} again")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
    """Write a file of a samples folder; it is there as a whole or not at all.

    Raises:
        FileProblem: a value is NaN or infinite, or the disk refuses.
    """
    write_tensor_file(path, tensors, {"format": FORMAT, "values": json.dumps(dict(values or {}), allow_nan=False)})
