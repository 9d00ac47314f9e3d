"""Tensors as a file holds them, by name: those below a prefix, their bytes, a hash, and whether all are finite."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FINITE_CHUNK = 2**22  # values looked at together, so that the check needs little memory


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite; true of tensors of whole numbers."""
    if not tensor.is_floating_point():
        return True
    narrow = tensor.element_size() == 1  # float8 has no isfinite of its own
    chunks = tensor.reshape(-1).split(FINITE_CHUNK)
    return all(bool((chunk.float() if narrow else chunk).isfinite().all()) for chunk in chunks)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor of any device and stride."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def content_sha256(tensors: Mapping[str, Tensor], values: dict[str, Any] | list[str] | None = None) -> str:
    """Return the sha256 of names, dtypes, shapes and bytes of tensors, in any order, and of values beside them."""
    digest = hashlib.sha256(json.dumps(values or {}, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
