"""Trainable changes of weights: low-rank or whole, added to the outputs of a model's projections by hooks.

A hook works on quantised and cast layers alike and never touches a weight: with the switch off, the model is the
teacher. Saved under ComfyUI's LoRA keys, the same changes load through its own loader.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.protocols import Switch
from ..engine.schedule import generator

PREFIX = "diffusion_model."
LORA_KEY = re.compile(PREFIX + r"(?P<path>.+?)\.(?P<part>lora_up|lora_down|lora_A|lora_B|alpha|diff)(?:\.weight)?")


class LowRank(nn.Module):
    """x -> up (down x): a change of rank `rank`, 0 at the start.

    Shapes:
        x: (..., columns). Output: (..., rows) in the dtype of x. down: (rank, columns), up: (rows, rank), both fp32.

    Args:
        rows, columns: of the projection's weight.
        rank: at least 1; more than rows or columns hold is cut.
        random: draws `down`, uniform in +-1 / sqrt(columns).

    Source: LoRA (arXiv 2106.09685); alpha is the rank, so that the factor alpha / rank is 1.
    """

    def __init__(self, rows: int, columns: int, rank: int, random: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter((torch.rand(rank, columns, generator=random) * 2 - 1) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def whole(self) -> Tensor:
        """Return the change as one matrix, (rows, columns)."""
        return self.up.detach() @ self.down.detach()

    def stored(self) -> dict[str, Tensor]:
        """Return it under the endings of LoRA keys."""
        rank = torch.tensor(float(self.down.shape[0]))
        return {"lora_up.weight": self.up, "lora_down.weight": self.down, "alpha": rank}


class FullRank(nn.Module):
    """x -> weight x: a change of the whole projection, 0 at the start.

    Shapes:
        x: (..., columns). Output: (..., rows) in the dtype of x. weight: (rows, columns), fp32.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def whole(self) -> Tensor:
        """Return the change as one matrix, (rows, columns)."""
        return self.weight.detach()

    def stored(self) -> dict[str, Tensor]:
        """Return it under the endings of LoRA keys."""
        return {"diff": self.weight}


Delta = LowRank | FullRank


def projections(module: nn.Module, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of every layer with a matrix at or below some paths, by its own path."""
    found = {}
    for path in paths:
        for name, layer in module.get_submodule(path).named_modules(prefix=path):
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(layer, nn.Embedding):
                # quantised weights may be packed into fewer columns
                rows, columns = weight.shape
                found[name] = (getattr(layer, "out_features", rows), getattr(layer, "in_features", columns))
    return found


def new_deltas(sizes: Mapping[str, tuple[int, int]], kind: str, rank: int, seed: int) -> dict[str, Delta]:
    """Return changes of 0 for projections, by path.

    Args:
        sizes: (rows, columns) by path.
        kind: "lora" or "full"; "maps" makes none.
        rank: of "lora".
        seed: of the start of "lora"; each projection draws its own.
    """
    if kind == "maps":
        return {}
    if kind == "full":
        return {path: FullRank(*size) for path, size in sizes.items()}
    return {path: LowRank(*size, rank, generator(seed, "delta", path)) for path, size in sizes.items()}


def read_deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """Return a student's changes as modules, by path.

    Args:
        tensors: as `StudentFile.deltas`.

    Raises:
        ValueError: one is no matrix, or changes something else than a weight by a difference.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = LORA_KEY.fullmatch(name)
        if found is None or (found["part"] != "alpha" and tensor.ndim != 2):
            raise ValueError(f"the student changes {name}, and only differences of matrices can be trained further")
        parts.setdefault(found["path"], {})[found["part"]] = tensor.detach().float()
    return {path: _read(each) for path, each in parts.items()}


def _read(parts: Mapping[str, Tensor]) -> Delta:
    if "diff" in parts:
        whole = FullRank(*parts["diff"].shape)
        whole.weight.data.copy_(parts["diff"])
        return whole
    up = parts["lora_up"] if "lora_up" in parts else parts["lora_B"]
    down = parts["lora_down"] if "lora_down" in parts else parts["lora_A"]
    delta = LowRank(up.shape[0], down.shape[1], 1, torch.Generator())
    scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
    delta.up, delta.down = nn.Parameter(up * scale), nn.Parameter(down.clone())
    return delta


def made_whole(delta: Delta) -> FullRank:
    """Return the same change as one that may become of any rank."""
    whole = delta.whole()
    found = FullRank(*whole.shape)
    found.weight.data.copy_(whole)
    return found


def as_deltas(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """Return changes as `StudentFile.deltas` holds them: fp32 on the CPU, under the keys of ComfyUI's LoRA loader."""
    return {
        f"{PREFIX}{path}.{ending}": tensor.detach().float().cpu().clone()
        for path, delta in deltas.items()
        for ending, tensor in delta.stored().items()
    }


def attach(module: nn.Module, deltas: Mapping[str, Delta], switch: Switch) -> Callable[[], None]:
    """Add changes to the outputs of a model's projections while it runs as student.

    Args:
        module: the diffusion model.
        deltas: by path of the layer.
        switch: read at every call.

    Returns:
        A function that takes the hooks away.
    """
    handles = [
        module.get_submodule(path).register_forward_hook(_hook(delta, switch), with_kwargs=True)
        for path, delta in deltas.items()
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _hook(delta: Delta, switch: Switch) -> Any:
    def add(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if not switch.is_student:
            return None
        given = args[0] if args else next(iter(kwargs.values()))
        return output + delta(given).to(output.dtype)

    return add
