"""Turns ComfyUI's CONDITIONING into what a samples file holds, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.clip_vision
import torch
from torch import Tensor

from ..samples.conditioning import CONTROL_NET, CROSS_ATTN, Conditioning
from ..samples.files import NODE, SamplesProblem
from ..samples.nested import Record, can_store, is_scalar
from .control import describe_control

GUIDANCE, CONTROL = "guidance", "control"
CLIP_VISION = "clip_vision_output"  # a record of what an encoder of pictures gives
# where and when an entry counts; samples are made of entries that count everywhere, always
PARTIAL = ("area", "mask", "mask_strength", "set_area_to_bounds", "strength", "start_percent", "end_percent",
           "clip_start_percent", "clip_end_percent", "timestep_start", "timestep_end", "default")  # fmt: skip


def to_conditioning(entries: Sequence[Any]) -> Conditioning:
    """Return a CONDITIONING of one entry as tensors on the CPU and plain values, in lists and maps where it has them.

    Raises:
        SamplesProblem: it has no entry or several, or holds what no file can, such as a mask or a hook.
    """
    if len(entries) != 1:
        raise SamplesProblem(
            f"samples are made of a conditioning with one entry, this one has {len(entries)}; leave out nodes that "
            "combine conditionings or schedule them"
        )
    cross_attn, options = entries[0][0], entries[0][1]
    live = {name: options[name] for name in (CONTROL,) if options.get(name) is not None}
    found = {name: describe_control(value) if name in live else _as_data(value) for name, value in options.items()}
    refused = [name for name, value in found.items() if name in (*PARTIAL, CROSS_ATTN) or not can_store(value)]
    refused += [CROSS_ATTN] if cross_attn is not None and not isinstance(cross_attn, Tensor) else []
    if refused:
        raise SamplesProblem(
            f"samples cannot be made of a conditioning with {refused[0]}; leave out the node that puts it there "
            "(mask, area, hook, GLIGEN or the like)"
        )
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in found.items() if is_scalar(value)}
    nested = {name: value for name, value in found.items() if name not in tensors and name not in values}
    return Conditioning(None if cross_attn is None else cross_attn.detach().cpu(), tensors, values, nested, live)


def _as_data(value: Any) -> Any:
    """Return an option with its tensors on the CPU and its known objects as records."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, comfy.clip_vision.Output):
        return Record(CLIP_VISION, {name: _as_data(each) for name, each in vars(value).items()})
    if type(value) in (list, tuple):
        return type(value)(_as_data(each) for each in value)
    return {name: _as_data(each) for name, each in value.items()} if type(value) is dict else value


def from_conditioning(conditioning: Conditioning) -> list[Any]:
    """Return it as ComfyUI's CONDITIONING; its tensors are normal ones, which autograd can save.

    Raises:
        SamplesProblem: it needs a ControlNet that is not at hand.
    """
    options = {**conditioning.tensors, **conditioning.values, **conditioning.nested, **conditioning.live}
    with torch.inference_mode(False):
        return [[_as_option(conditioning.cross_attn), {name: _as_option(value) for name, value in options.items()}]]


def _as_option(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_as_option(each) for each in value)
    if isinstance(value, Record) and value.kind == CLIP_VISION:
        output = comfy.clip_vision.Output()
        for name, each in value.fields.items():
            output[name] = _as_option(each)
        return output
    if isinstance(value, Record):
        needed = "a ControlNet" if value.kind == CONTROL_NET else f"an object of kind {value.kind!r}"
        raise SamplesProblem(
            f"these samples were made with {needed}, which no folder holds; run {NODE} with the same conditionings in "
            "the same graph, and train in one process"
        )
    return {name: _as_option(each) for name, each in value.items()} if isinstance(value, Mapping) else value


def ready_conditioning(entries: Sequence[Any], guidance: float) -> Conditioning:
    """Return a CONDITIONING as samples are made of it: with FLUX's guidance, unless it has its own or `guidance` is 0.

    Raises:
        SamplesProblem: as in `to_conditioning`.
    """
    found = to_conditioning(entries)
    if not guidance or GUIDANCE in found.values:
        return found
    return replace(found, values={**found.values, GUIDANCE: guidance})
