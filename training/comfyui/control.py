"""ControlNets of a conditioning: identified by a record, and run beside the model where available.

What a ControlNet adds depends on the noised picture and the noise level, and training draws new ones at every update,
so nothing that it computed is stored: it is asked again. A folder of samples holds what was given to it, not its
weights.
"""

from typing import Any

import torch

from ...attention.students.fingerprint import weights_digest
from ..samples.conditioning import CONTROL_NET
from ..samples.files import SamplesProblem
from ..samples.nested import Record

MODULE = "comfy.controlnet"


def describe_control(control: Any) -> Record:
    """Return what a ControlNet is and was given: its picture, strength, range, arguments, digests of its weights.

    Raises:
        SamplesProblem: it is of a kind whose state is not known, or holds hooks.
    """
    kind = type(control)
    if not hasattr(control, "control_model_wrapped") or kind.__module__ != MODULE:
        raise SamplesProblem(
            f"samples cannot be made of a conditioning with a control of type {kind.__name__}; use a ControlNet from "
            "ComfyUI's own Load ControlNet Model and Apply ControlNet"
        )
    if control.extra_hooks is not None:
        raise SamplesProblem("samples cannot be made of a conditioning with hooks on a ControlNet; leave them out")
    previous, vae = control.previous_controlnet, control.vae
    return Record(CONTROL_NET, {
        "class": kind.__name__,
        "weights": weights_digest(control.control_model.state_dict().items()),
        "vae": None if vae is None else weights_digest(vae.first_stage_model.state_dict().items()),
        "hint": control.cond_hint_original.detach().cpu(),
        "strength": float(control.strength),
        "strength_type": control.strength_type.name,
        "percents": tuple(map(float, control.timestep_percent_range)),
        # the model itself is put there while it samples
        "extra_args": {name: value for name, value in control.extra_args.items() if name != "base_model"},
        "extra_concat": [each.detach().cpu() for each in control.extra_concat_orig],
        "previous": None if previous is None else describe_control(previous),
    })  # fmt: skip


class ControlWithoutGradient:
    """Has a ControlNet compute without a graph: the student that learns beside it changes none of its inputs."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._control.get_control(*args, **kwargs)
