"""What distinguishes model patchers: for samples weights, LoRAs and noise levels, for jobs every other change too."""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ...attention.students import fingerprint
from ...attention.students.tensor_values import tensor_bytes
from ...patching.patcher import change_names, model_fingerprint

PREFIX = "diffusion_model."
PERCENTS = (0.1, 0.5, 0.9)


def weights_digest(model: Any) -> str:
    """Return the digest of a model patcher's base weights, which lie under its patches."""
    weights = _stored_weights(model)
    for key, backup in model.backup.items():
        if key.startswith(PREFIX):
            # what packed weights bring beside themselves belongs to the copy that is replaced
            for name in [name for name in weights if name == key or name.startswith(f"{key}_")]:
                del weights[name]
            packed = getattr(backup.weight, "state_dict", None)
            weights.update(packed(key) if packed else {key: backup.weight})
    return fingerprint.weights_digest((name.replace("_orig_mod.", ""), weight) for name, weight in weights.items())


def _stored_weights(model: Any) -> dict[str, torch.Tensor]:
    shown, held = model.model_state_dict(PREFIX), dict(model.model.named_parameters(remove_duplicate=False))
    # packs for GGUF show weights without values, and one that there is not, to whoever asks how much memory they take
    found = {name: held.get(name, weight) if weight.is_meta else weight for name, weight in shown.items()}
    return {name: weight for name, weight in found.items() if not weight.is_meta}


def model_digest(model: Any) -> str:
    """Return a hash of all that shapes a model's samples: weights, LoRAs on and beside them, noise levels."""
    digest = hashlib.sha256(weights_digest(model).encode())
    _add_patches(digest, model)
    injected = {name: list(map(_adapters, each)) for name, each in model.injections.items() if each}
    if injected:  # most models have none, and keep the digest that they had
        _add(digest, injected)
    return digest.hexdigest()


def job_digest(model: Any) -> str:
    """Return a hash of what a job depends on: as `model_digest`, and names of whatever else nodes changed."""
    return _job_digest(model, is_fast=_multiplies_in_fp8(model))


def earlier_job_digests(model: Any) -> tuple[str, ...]:
    """Return what earlier versions named jobs after: the norms, or a digest that ignored how weights are multiplied."""
    before = (_job_digest(model, is_fast=False),) if _multiplies_in_fp8(model) else ()
    return (*before, norms_digest(model))


def _job_digest(model: Any, *, is_fast: bool) -> str:
    digest = hashlib.sha256(model_digest(model).encode())
    _add(digest, change_names(model) + (["fp8_optimizations"] if is_fast else []))
    return digest.hexdigest()


def _multiplies_in_fp8(model: Any) -> bool:
    """Return whether a model was loaded as fp8_e4m3fn_fast: its weights are those of fp8_e4m3fn."""
    return bool(getattr(getattr(model.model, "model_config", None), "optimizations", {}).get("fp8"))


def norms_digest(model: Any) -> str:
    """Return what `job_digest` was in versions that knew a model by its norm weights: their jobs are named after it."""
    digest = hashlib.sha256(model_fingerprint(model).numpy().tobytes())
    _add_patches(digest, model)
    for name, weight in model.model_state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
    _add(digest, change_names(model))
    return digest.hexdigest()


def _add_patches(digest: Any, model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    _add(digest, [float(sampling.percent_to_sigma(percent)) for percent in PERCENTS])
    _add(digest, {str(key): entries for key, entries in model.patches.items()})


def _adapters(injection: Any) -> list[Any]:
    """Return what an injection of ComfyUI's bypass puts beside the weights; of others nothing is known but the name."""
    found = []
    for cell in getattr(getattr(injection, "inject", None), "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it is empty
            found.append(getattr(cell.cell_contents, "adapters", None))
    return found


def _add(digest: Any, value: Any) -> None:
    """Add a patch to a hash: contents of tensors, whatever device they lie on."""
    if isinstance(value, torch.Tensor):
        digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(str(name).encode())
            _add(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}]".encode())
        for each in value:
            _add(digest, each)
    elif hasattr(value, "weights"):  # a weight adapter of ComfyUI
        digest.update(type(value).__name__.encode())
        _add(digest, value.weights)
    else:
        digest.update(repr(value if isinstance(value, (int, float, str, type(None))) else type(value)).encode())
