"""Calibrations from run to run: found in a file, worked out from another size, or measured and then remembered.

One file holds what was measured of a model, as loaded, on one device with one list of candidates; see
`attention/calibration/file.py`. It lies in `models/linearize/plans`. What belongs to another machine is not found here,
so a shared workflow is measured anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import folder_paths
import torch
from comfy.nested_tensor import NestedTensor

from ..attention.calibration.choice import Choice, Target, choose_unchecked
from ..attention.calibration.file import Calibration, file_name, read_calibrations, write_calibration
from ..attention.calibration.other_size import at_latent, nearest
from ..attention.runtime.override import describe_override
from ..attention.runtime.record import once
from ..attention.spec_json import spec_to_json
from ..attention.specs import Spec
from .calibrate import Sampling, calibrate
from .patcher import compute_dtype, host_of, model_fingerprint, override_below, weight_types

MEASURES = 1  # raised when the pack's own kinds become faster or slower
FOLDER = "plans"


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What is to be calibrated.

    Args:
        model: a model patcher.
        sampling: how it is sampled.
        candidates: specs.
        target: what is asked for.
        most_checks: as in `calibrate`.
    """

    model: Any
    sampling: Sampling
    candidates: Sequence[Spec]
    target: Target
    most_checks: int = 4


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A calibration, and where it is from.

    Args:
        calibration, choice: what was measured and chosen.
        device: that it was measured on.
        note: what was not done now, such as that it is remembered; empty where all was.
        other_size: in words, of the latent that was measured instead of this one; empty where it was this one.
        latent: what the steps left; None where none ran.
    """

    calibration: Calibration
    choice: Choice
    device: str
    note: str = ""
    other_size: str = ""
    latent: Any = None

    def words(self, size: str) -> str:
        """Return at which size it was measured, and what was not done now.

        Args:
            size: that it is for, in words.
        """
        at = f"at latent {self.other_size}, worked out for {size}" if self.other_size else f"at {size}"
        return f"{at}; {self.note}" if self.note else at


def calibrations(orders: Sequence[Order], latent: Any, *, again: bool, show: Callable[[str], None]) -> list[Found]:
    """Return a calibration for each of the models that sample one after the other, remembered ones where all are.

    Args:
        orders: of the models, the one of the first steps first.
        latent: to sample, as in `calibrate`.
        again: whether to measure anew.
        show: as in `calibrate`.

    Raises:
        As `calibrate`.
    """
    found = [None if again else remembered(order, latent) for order in orders]
    known = [each for each in found if each is not None]
    if len(known) == len(orders):
        return known
    known, noise = [], None
    for order in orders:
        known.append(measure(order, latent, show, noise))
        latent = known[-1].latent
        noise = zeros_like(latent)  # the next one goes on from there
    return known


def zeros_like(latent: Any) -> Any:
    """Return a latent of zeros, of as many parts."""
    if latent.is_nested:
        return NestedTensor([torch.zeros_like(part) for part in latent.unbind()])
    return torch.zeros_like(latent)


def remembered(order: Order, latent: Any) -> Found | None:
    """Return what earlier runs measured of this model here: at this size, else worked out from one near it."""
    machine = machine_of(order)
    stored = read_calibrations(_path(order, machine), machine)
    shape, beside = _shape(latent), _beside(order)
    # what was never run as a whole, or was watched in fewer steps, is no base for other choices
    steps = sampling_steps(order.sampling)
    stored = {
        size: each
        for size, each in stored.items()
        if each.steps >= steps and any(checked is not None for _, checked in each.choices.values())
    }
    own, device = stored.get(_size(shape, beside)), str(machine["device"])
    if own is not None:
        choice = own.choice(order.target)
        if choice is not None:
            return Found(own, choice, device, "remembered")
        choice = choose_unchecked(own.sites, order.target, own.weights)
        return Found(own, choice, device, "remembered, this choice was not run")
    near = nearest({size: each for size, each in stored.items() if size == _size(each.latent, beside)}, shape)
    if near is None:
        return None
    scaled = at_latent(near, shape)
    choice = choose_unchecked(scaled.sites, order.target, scaled.weights)
    return Found(scaled, choice, device, other_size=" x ".join(map(str, near.latent)))


def measure(order: Order, latent: Any, show: Callable[[str], None], noise: Any = None) -> Found:
    """Measure a model, and remember it; errors as `calibrate`."""
    machine, sampling = machine_of(order), order.sampling
    size = _size(_shape(latent), _beside(order))
    facts = json.dumps([machine, size, sampling.steps, sampling.part, sampling.seed, sampling.cfg], sort_keys=True)
    digest = hashlib.sha256(facts.encode())
    for _, value in _tensors([sampling.positive, sampling.negative, latent]):
        digest.update(value.detach().float().cpu().numpy().tobytes())
    name = f"calibrating-{digest.hexdigest()[:12]}.safetensors"
    state = Path(folder_paths.get_system_user_directory("linearize")) / name
    found = calibrate(
        order.model, latent, sampling, order.candidates, order.target,
        most_checks=order.most_checks, show=show, state=state, noise=noise,
    )  # fmt: skip
    try:
        write_calibration(_path(order, machine), machine, size, found.calibration)
    except (OSError, ValueError) as error:
        once.warning(f"Linearize: a calibration could not be remembered: {type(error).__name__}")
    return Found(found.calibration, found.choice, str(machine["device"]), latent=found.latent)


def machine_of(order: Order) -> dict[str, Any]:
    """Return what measures depend on beside the size: model, weights, device, attention below, versions, candidates."""
    host, _ = host_of(order.model)
    device = comfy.model_management.get_torch_device()
    below = override_below(order.model)
    core = comfy.ldm.modules.attention.optimized_attention
    return {
        "host": host.name,
        "model": hashlib.sha256(model_fingerprint(order.model).numpy().tobytes()).hexdigest()[:16],
        "weights": weight_types(order.model),
        "dtype": str(compute_dtype(order.model)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "attention": getattr(core, "__name__", "attention") if below is None else describe_override(below),
        "torch": torch.__version__,
        "measures": MEASURES,
        "candidates": [spec_to_json(spec) for spec in order.candidates],
    }


def _path(order: Order, machine: dict[str, Any]) -> Path:
    host, _ = host_of(order.model)
    return Path(folder_paths.get_folder_paths("linearize")[0]) / FOLDER / file_name(host.name, machine)


def _shape(latent: Any) -> tuple[int, ...]:
    return tuple((latent.unbind()[0] if latent.is_nested else latent).shape[1:])


def _size(shape: Sequence[int], beside: str) -> str:
    return " x ".join(map(str, shape)) + beside


def _beside(order: Order) -> str:
    """Return in words what else makes calls longer or others: guidance, prompts, part, LoRAs, references, masks."""
    sampling = order.sampling
    negative = sampling.negative if sampling.negative is not None and sampling.cfg != 1 else ()
    prompts = [*sampling.positive, *negative]
    words = ["guided"] if negative else []
    words += [f"{len(prompts)} prompts"] if len(prompts) > (2 if negative else 1) else []
    words += [f"steps {sampling.part[0]} to {sampling.part[1]}"] if sampling.part else []
    if order.model.patches:  # strengths do not count: what a site misses hardly changes with them
        keys = hashlib.sha256("".join(sorted(map(str, order.model.patches))).encode()).hexdigest()
        words.append(f"patched {keys[:8]}")
    entries = (tuple(_beside_prompt(options)) for _, options in prompts)
    words += [word for entry in dict.fromkeys(entries) for word in entry]
    return "".join(f", {word}" for word in words)


def _beside_prompt(options: Mapping[str, Any]) -> Iterator[str]:
    for each in options.get("reference_latents") or ():
        yield "reference " + " x ".join(map(str, each.shape[1:]))
    if options.get("control") is not None:
        yield "with a ControlNet"
    if options.get("area") is not None or options.get("mask") is not None:
        yield "in an area"


def sampling_steps(sampling: Sampling) -> int:
    """Return how many steps of a sampling a model makes."""
    return sampling.steps if sampling.part is None else sampling.part[1] - sampling.part[0]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of conditionings and latents, whatever they lie in."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _tensors(each, f"{name}.{number}")
    elif getattr(value, "is_nested", False):
        yield from _tensors(value.unbind(), name)
