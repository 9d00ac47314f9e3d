"""Options of a conditioning that are lists, maps or records, as JSON beside tensors.

Tensors are numbered in the order in which they are met; what else there is stands in the JSON. Which objects of ComfyUI
are records is known to `training/comfyui/conditioning.py` alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...attention.checks import MOST_SEED
from ...attention.students.tensor_file import DTYPES

MAX_DEPTH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An object as data.

    Args:
        kind: of the object.
        fields: its attributes.
    """

    kind: str
    fields: Mapping[str, Any]


def is_scalar(value: object) -> TypeGuard[str | int | float | bool | None]:
    """Return whether JSON holds a value exactly, and everybody reads it: no number is out of all bounds."""
    if isinstance(value, (int, float)):
        return -MOST_SEED <= value <= MOST_SEED  # NaN is not
    return value is None or isinstance(value, str)


def can_store(value: object, depth: int = 0) -> bool:
    """Return whether a file can hold a value: dense tensors and plain values, in whatever lists, maps and records."""
    if isinstance(value, Tensor):
        return value.dtype in DTYPES.values() and value.layout == torch.strided and not value.is_nested
    if isinstance(value, Record):
        value = value.fields
    if isinstance(value, Mapping):
        known = all(isinstance(name, str) for name in value)
        return known and depth < MAX_DEPTH and all(can_store(each, depth + 1) for each in value.values())
    if isinstance(value, (list, tuple)):
        return depth < MAX_DEPTH and all(can_store(each, depth + 1) for each in value)
    return is_scalar(value)


def pack(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value as JSON holds it; its tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Record):
        return {"record": value.kind, "fields": _pack_all(value.fields, tensors)}
    if isinstance(value, Mapping):
        return {"map": _pack_all(value, tensors)}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [pack(each, tensors) for each in value]}
    return value


def _pack_all(values: Mapping[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    return {name: pack(values[name], tensors) for name in sorted(values)}


def unpack(data: Any, tensor: Callable[[int], Tensor], depth: int = 0) -> Any:
    """Return the value that `pack` made JSON of.

    Args:
        data: from a file, whatever it holds.
        tensor: returns a tensor by its number, or raises LookupError.

    Raises:
        ValueError: it is not from `pack`. LookupError: as `tensor`.
    """

    def deeper(each: Any) -> Any:
        return unpack(each, tensor, depth + 1)

    if is_scalar(data):
        return data
    names = set(data) if isinstance(data, dict) and depth <= MAX_DEPTH else set()
    if names == {"tensor"} and type(data["tensor"]) is int:
        return tensor(data["tensor"])
    if names in ({"list"}, {"tuple"}) and isinstance(items := data[names.pop()], list):
        return [deeper(each) for each in items] if "list" in data else tuple(deeper(each) for each in items)
    if names == {"map"} and isinstance(data["map"], dict):
        return {name: deeper(each) for name, each in data["map"].items()}
    if names == {"record", "fields"} and isinstance(data["record"], str) and isinstance(data["fields"], dict):
        return Record(data["record"], {name: deeper(each) for name, each in data["fields"].items()})
    raise ValueError(f"no option of a conditioning is stored as {type(data).__name__}")


def has_record(value: Any, kind: str, levels: int = 4 * MAX_DEPTH) -> bool:
    """Return whether packed JSON holds a record of a kind, as deep as `unpack` reads it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    is_one = isinstance(value, dict) and value.get("record") == kind
    return is_one or (levels > 0 and any(has_record(each, kind, levels - 1) for each in parts))
