"""Conditionings of a samples folder: what a prompt became, in files named after their contents.

Which files belong to which sample is not known here; `index.py` lists them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...attention.checks import json_or_none
from ...attention.students.tensor_file import open_tensor_file
from ...attention.students.tensor_values import content_sha256
from .files import load_tensors, unknown_file
from .nested import has_record, is_scalar, pack, unpack

CONDITIONINGS = "conditioning"
CONDITIONING_FILE = re.compile(CONDITIONINGS + r"/[0-9a-f]{64}\.safetensors")
CROSS_ATTN, OPTION, NESTED = "cross_attn", "option.", "nested."  # names of tensors in the files
CONTROL_NET = "control_net"  # a record of a network that no folder holds

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What a prompt became: one entry of ComfyUI's CONDITIONING, as far as a file can hold it.

    Args:
        cross_attn: (1, T, width) text tokens, None where the model takes none.
        tensors: options that are tensors, such as `pooled_output`.
        values: options that JSON holds exactly, such as `guidance`.
        nested: options that are lists, maps or records, such as `reference_latents`; see `nested.py`.
        live: by option, the objects that records in `nested` describe and no file holds, such as a ControlNet; only
            where they are at hand.
    """

    cross_attn: Tensor | None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)
    nested: Mapping[str, Any] = field(default_factory=dict)
    live: Mapping[str, Any] = field(default_factory=dict)

    def stored(self) -> dict[str, Tensor]:
        """Return all tensors under the names that they have in a file."""
        options = {OPTION + name: tensor for name, tensor in self.tensors.items()}
        options |= {f"{NESTED}{number}": tensor for number, tensor in enumerate(self._packed()[1])}
        return options if self.cross_attn is None else {CROSS_ATTN: self.cross_attn, **options}

    def stored_values(self) -> dict[str, Any]:
        """Return what a file holds beside them, as JSON."""
        return {**self.values, **self._packed()[0]}

    def _packed(self) -> tuple[dict[str, Any], list[Tensor]]:
        tensors: list[Tensor] = []
        return {name: pack(self.nested[name], tensors) for name in sorted(self.nested)}, tensors

    @property
    def file(self) -> str:
        """The file that holds it, named after its contents."""
        return f"{CONDITIONINGS}/{content_sha256(self.stored(), self.stored_values())}.safetensors"


def read_conditioning(path: Path) -> Conditioning:
    """Return the conditioning of a file.

    Raises:
        ValueError: it cannot be read, or is another kind of file; one sentence.
    """
    tensors, values = load_tensors(path)
    options = {name.removeprefix(OPTION): tensor for name, tensor in tensors.items() if name.startswith(OPTION)}
    plain = {name: value for name, value in values.items() if is_scalar(value)}
    try:
        nested = {
            name: unpack(value, lambda number: tensors[f"{NESTED}{number}"])
            for name, value in values.items()
            if name not in plain
        }
    except (ValueError, LookupError):
        raise unknown_file(path) from None
    return Conditioning(tensors.get(CROSS_ATTN), options, plain, nested)


def needs_control_net(path: Path) -> bool:
    """Return whether the conditioning of a file has a ControlNet; no tensor is read.

    Raises:
        ValueError: as `read_conditioning`.
    """
    return has_record(json_or_none(open_tensor_file(path).metadata.get("values", "")), CONTROL_NET)
