"""Calibrate Attention: measures untrained kinds on the user's model, device and size, and runs the best plan found."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io
from torch import Tensor

from .. import patching
from ..attention.calibration.candidates import USUAL, read_candidates
from ..attention.calibration.choice import Target
from ..attention.calibration.describe import details, outcome, when_and_where
from ..attention.calibration.measures import measured_sites
from ..attention.planning.report import describe_sampled
from ..attention.plans import Plan
from ..attention.runtime.runtime import SiteSettings
from ..attention.specs import DenseSpec, Spec
from ..patching.calibrate import LEAST_STEPS, Sampling
from ..patching.calibrations import Found, Order, calibrations, zeros_like
from . import node_status
from .plan_picture import draw_measured
from .sentences import answer
from .sockets import CATEGORY, EXPERIMENTAL, AttentionPlan

ERROR, SHARE = 0.002, 0.3
LEAST_TIME, LEAST_ERROR = "least time", "least error"
MOST_CHECKS = 64


class LinearizeCalibrate(io.ComfyNode):
    """Patches a clone of the model with the plan that was found; a plan found once is remembered."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        more: dict[str, Any] = {"optional": True, "advanced": True}
        return io.Schema(
            node_id="LinearizeCalibrate",
            display_name="Calibrate Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Measures what attention costs and loses on your model, device and size, chooses what each "
            "site runs, and says how many seconds a step that saves. Takes about as long as 20 steps once; then "
            "the result is remembered.",
            search_aliases=[
                "calibrate", "autotune", "benchmark attention", "fastest attention", "speed up", "which settings",
                "no speedup", "seconds", "profile", "校准", "加速", "测速",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs, from before any other Linearize node. It is "
                               "not changed; a patched copy comes out."),
                io.Conditioning.Input("positive", tooltip="Your prompt, as the sampler gets it."),
                io.Latent.Input("latent_image", tooltip="The latent that the sampler gets; its size is what counts."),
                io.DynamicCombo.Input(
                    "target",
                    options=[
                        io.DynamicCombo.Option(LEAST_TIME, [io.Float.Input(
                            "max_error", default=ERROR, min=0.00001, max=1.0, step=0.0005, round=0.00001,
                            tooltip="Largest error of what the model predicts in a step, against dense attention. "
                            "0.002 is hard to see, 0.02 changes details.",
                        )]),
                        io.DynamicCombo.Option(LEAST_ERROR, [io.Float.Input(
                            "time_share", default=SHARE, min=0.01, max=1.0, step=0.01,
                            tooltip="Share of dense attention's time that may be left.",
                        )]),
                    ],
                    tooltip="least time takes what is fastest within an error. least error takes what errs least "
                    "within a share of attention's time.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Only where you sample with cfg above 1."),
                io.Model.Input("low_noise_model", optional=True, tooltip="The second expert of Wan 2.2. It goes on "
                               "after half of the steps and gets a plan of its own."),
                io.Float.Input("cfg", default=1.0, min=1.0, max=100.0, step=0.1, tooltip="Guidance of your sampler; "
                               "above 1 it needs negative.", **more),
                io.Int.Input("steps", default=8, min=LEAST_STEPS, max=1000, tooltip="Steps of the sampling that is "
                             "watched. More measure more noise levels.", **more),
                io.String.Input("candidates", default=USUAL, tooltip="What is measured: clear with a radius in tokens, "
                                "foveated with the share it keeps.", **more),
                io.Int.Input("checks", default=4, min=1, max=MOST_CHECKS, tooltip="Plans that the whole model tries, "
                             "two forwards each. More find a better one where errors of sites do not add up.", **more),
                io.Boolean.Input("again", default=False, tooltip="Measures anew, even where this machine remembers.",
                                 **more),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model."),
                AttentionPlan.Output(tooltip="What every site runs."),
                io.String.Output(display_name="text", tooltip="Seconds a step, errors, and what each site runs."),
                io.Image.Output(display_name="plan_map", tooltip="One row per site: milliseconds of dense attention in "
                                "grey, of what it runs in colour."),
                io.Model.Output(display_name="low_noise_model", tooltip="The patched second expert; without one, "
                                "nothing."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, candidates: str = USUAL, target: dict | None = None):
        """Return whether the list can be read, whatever the model. ComfyUI hands over `target` unasked."""
        return answer(read_candidates, candidates)

    @classmethod
    def execute(
        cls, model, positive, latent_image, target: dict | None = None, negative=None, low_noise_model=None,
        cfg: float = 1.0, steps: int = 8, candidates: str = USUAL, checks: int = 4, again: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the patched model, its plan, a text, its map, and the patched second expert."""
        if cfg > 1 and negative is None:
            raise ValueError(f"cfg is {cfg:g}, which needs a negative prompt; connect negative, or set cfg to 1")
        models = [each for each in (model, low_noise_model) if each is not None]
        sampling = Sampling(positive, negative if cfg > 1 else None, cfg, steps)
        orders = [
            Order(each, own, candidates_of(each, candidates), read_target(target), checks)
            for each, own in zip(models, parts_of(sampling, len(models)), strict=True)
        ]
        show = node_status.show_on_node(cls.hidden.unique_id)
        found = calibrations(orders, empty_latent(model, latent_image), again=again, show=show)
        results = [install(order.model, each, order.target, cls.hidden.unique_id)
                   for order, each in zip(orders, found, strict=True)]  # fmt: skip
        text = "\n\n".join(result.text for result in results)
        show(text)
        second = results[1].model if len(results) > 1 else None
        return io.NodeOutput(results[0].model, results[0].plan, text, results[0].picture, second)


@dataclass(frozen=True, slots=True, eq=False)
class Installed:
    """A patched model with what the node gives beside it."""

    model: Any
    plan: Plan
    text: str
    picture: Tensor


def read_target(target: Mapping[str, Any] | None) -> Target:
    """Return what the input `target` asks for.

    Raises:
        ValueError: it is none of the choices, or its number is out of range.
    """
    if not target:  # of a choice that there is not, ComfyUI hands nothing over
        raise ValueError(f"target is {LEAST_TIME} or {LEAST_ERROR}")
    if target["target"] == LEAST_TIME:
        return Target("error", target["max_error"])
    return Target("time", target["time_share"])


def candidates_of(model: Any, text: str) -> tuple[Spec, ...]:
    """Return the candidates of a model.

    Raises:
        ValueError: the list cannot be read, no host knows the model, or an earlier node runs trained weights on it.
    """
    host, module = patching.host_of(model)
    runtime = patching.runtime_of(model)
    if runtime is not None and any(settings.trained for settings in runtime.sites.values()):
        raise ValueError(
            "an earlier Linearize node runs trained weights on this model; connect the model from before that node"
        )
    on_gpu = comfy.model_management.get_torch_device().type != "cpu"
    return read_candidates(text, is_clip=host.makes_clips(module), on_gpu=on_gpu)


def parts_of(sampling: Sampling, count: int) -> list[Sampling]:
    """Return the samplings of models that share the steps; each has enough of them to be measured."""
    if count == 1:
        return [sampling]
    half = max(sampling.steps // 2, LEAST_STEPS)
    return [replace(sampling, steps=2 * half, part=(number * half, (number + 1) * half)) for number in range(count)]


def empty_latent(model: Any, latent: Mapping[str, Any]) -> Any:
    """Return one empty latent of this size, as the model takes it."""
    samples = latent["samples"]
    if samples.is_nested:
        return zeros_like(NestedTensor([part[:1] for part in samples.unbind()]))
    scales = (latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    return comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples[:1]), *scales)


def install(model: Any, found: Found, target: Target, node_id: str | None) -> Installed:
    """Return a clone of `model` that runs what was chosen, with the text and the map of it."""
    host, module = patching.host_of(model)
    calibration, chosen = found.calibration, found.choice.specs
    layouts = [each.layout for each in calibration.sites if each.layout is not None]
    largest = [max(layouts, key=lambda layout: layout.num_tokens)] if layouts else []
    size = describe_sampled(host, module, largest)
    where = f"{when_and_where(calibration.at, found.device)}, {found.words(size)}"
    measured = measured_sites(calibration.sites, chosen, where)
    settings = {
        each.site: SiteSettings(
            chosen.get(each.site, DenseSpec()),
            min_tokens=each.layout.num_tokens // 2 if each.layout else 0,  # far below, nobody knows
            measured=measured[each.site],
        )
        for each in calibration.sites
    }
    seen = f"measured {where}"
    came_out = outcome(calibration, found.choice, target)
    text = "\n".join([came_out, *details(calibration, found.choice), seen])
    notes = [came_out, seen, *patching.replaced_notes(model, settings)]
    patched, runtime = patching.patch_model(model, settings, node_status.show_on_node(node_id, notes))
    picture = draw_measured(host.title, measured, {site: each.spec for site, each in settings.items()})
    return Installed(patched, runtime.plan(), text, picture)
