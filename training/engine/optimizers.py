"""Optimisers by name, from PyTorch and other libraries, and their state as tensors for a file."""

import importlib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # module, class, package to install, arguments
    "adamw": ("torch.optim", "AdamW", "torch", {}),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", {}),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt",
                {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}),
    "schedule_free": ("schedulefree", "AdamWScheduleFree", "schedulefree", {}),
}  # fmt: skip
OWN_SCHEDULE = {"prodigy", "schedule_free"}  # they are run at a constant rate
OWN_RATE = {"prodigy"}  # it is told 1 and finds its rate
AVERAGING = {"schedule_free"}  # its weights to be used are not those that are trained
NUMBER = "number."


def check_optimizer(name: str) -> None:
    """Refuse an optimiser that cannot be made here.

    Raises:
        ValueError: no optimiser has that name, or its package is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)}, got {name!r}")
    module, _, package, _ = OPTIMIZERS[name]
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise ValueError(f"optimizer {name} needs the package {package}, which is not installed; adamw needs nothing")


def make_optimizer(name: str, groups: Iterable[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Return an optimiser.

    Args:
        name: one of OPTIMIZERS.
        groups: parameter groups as PyTorch takes them, each with a learning rate `lr`.
        options: such as `betas` and `weight_decay`.

    Raises:
        ValueError: no optimiser has that name, or its package is not installed.
    """
    check_optimizer(name)
    module, kind, _, own = OPTIMIZERS[name]
    return getattr(importlib.import_module(module), kind)(list(groups), **own, **options)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers, as tensors by name; `restore_optimizer` takes it back, bit by bit."""
    saved = optimizer.state_dict()
    entries = {f"state.{number}.{key}": value for number, of in saved["state"].items() for key, value in of.items()}
    for number, group in enumerate(saved["param_groups"]):
        entries |= {f"group.{number}.{key}": value for key, value in group.items() if key != "params"}
    tensors = {}
    for name, value in entries.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, bool | int | float) and math.isfinite(value):  # an infinite one is an option, not memory
            kind = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]
            tensors[NUMBER + name] = torch.tensor(value, dtype=kind)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser, made with the same parameters and options, what `optimizer_state` returned."""
    target = optimizer.state_dict()
    for name, tensor in tensors.items():
        where, number, key = name.removeprefix(NUMBER).split(".", 2)
        value = tensor.item() if name.startswith(NUMBER) else tensor
        if where == "state":
            target["state"].setdefault(int(number), {})[key] = value
        else:
            target["param_groups"][int(number)][key] = value
    optimizer.load_state_dict(target)
