"""ComfyUI's models as teachers: noised samples through the core's own conditioning and model call.

A run of training is one "sampling" to ComfyUI: the core loads the model, places it, runs the hooks of other nodes and
cleans up, and in between the training loop makes the forwards.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...attention.runtime.runtime import Runtime
from ...attention.site_call import SiteCall
from ...patching.patcher import host_of, watched
from ..engine.protocols import Draw, Observe
from ..engine.schedule import generator
from ..samples.folder import TeacherSamples
from .conditioning import CONTROL, from_conditioning
from .control import ControlWithoutGradient

KEPT = 32  # conditionings on the device; those of clips take 50 MB each
T = TypeVar("T")


class ComfyTeacher:
    """A teacher as `protocols.Teacher` describes it, inside a run of `with_teacher`."""

    def __init__(
        self, guider: Any, runtime: Any, options: dict[str, Any], samples: TeacherSamples, device: Any
    ) -> None:
        self.host, module = host_of(guider.model_patcher)
        self.sites = self.host.sites(module)
        self.num_samples, self.has_negative = len(samples.entries), samples.has_negative
        self.device = device
        self._model, self._runtime, self._options = guider.inner_model, runtime, options
        self._samples = samples
        self._conditions: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def watch(self, draw: Draw, observe: Observe) -> Tensor:
        def see(call: SiteCall) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                query, key, value, output = (each.clone() for each in (call.query, call.key, call.value, call.output))
                observe(replace(call, query=query, key=key, value=value, output=output))

        noised, sigma, _ = self.noised(draw)
        self._runtime.observe = see
        try:
            with torch.inference_mode():
                return self._velocity(draw, noised, sigma, self._options)
        finally:
            self._runtime.observe = None

    def noised(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noised sample, its noise level (1,), and the clean sample in the model's own scale."""
        clean = self._model.process_latent_in(self._samples.latent(draw.sample)).to(self.device, torch.float32)
        noise = torch.randn(clean.shape, generator=generator("noise", draw.seed)).to(clean)
        sampling = self._model.model_sampling
        matches_flows = isinstance(sampling, comfy.model_sampling.CONST)
        level = 1 - draw.percent if draw.unshifted and matches_flows else sampling.percent_to_sigma(draw.percent)
        sigma = torch.tensor([float(level)], device=self.device)
        return sampling.noise_scaling(sigma, noise, clean, False), sigma, clean

    def _velocity(self, draw: Draw, noised: Tensor, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        conditions: list[Any] = [None, None]
        conditions[draw.negative] = self._conditions_of(draw, noised)["negative" if draw.negative else "positive"]
        denoised = comfy.samplers.calc_cond_batch(self._model, conditions, noised, sigma, options)[draw.negative]
        return (noised - denoised).float() / sigma

    def _conditions_of(self, draw: Draw, noised: Tensor) -> dict[str, Any]:
        """Return the processed conditionings of a draw's sample, as its sampler had them; the last ones are kept."""
        entry = self._samples.entries[draw.sample]
        key = (entry.positive, entry.negative, entry.seed, noised.shape)
        if key not in self._conditions:
            names = ("positive", "negative") if self.has_negative else ("positive",)
            plain = {name: self._samples.conditioning(draw.sample, negative=name == "negative") for name in names}
            ready = {name: comfy.sampler_helpers.convert_cond(from_conditioning(plain[name])) for name in names}
            empty = torch.zeros_like(noised)
            self._conditions[key] = comfy.samplers.process_conds(
                self._model, noised, ready, self.device, empty, None, entry.seed, latent_shapes=[noised.shape]
            )
            for each in (entry for entries in self._conditions[key].values() for entry in entries):
                if each.get(CONTROL) is not None:
                    each[CONTROL] = ControlWithoutGradient(each[CONTROL])
        self._conditions.move_to_end(key)
        while len(self._conditions) > KEPT:
            self._conditions.popitem(last=False)
        return self._conditions[key]


class _Session(comfy.samplers.Sampler):
    """Runs work where the core expects a sampler to run."""

    def __init__(self, work: Callable[[Any, dict[str, Any]], None]) -> None:
        self._work = work

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):  # noqa: ANN001, ANN201  # fmt: skip
        """Do the work; the "picture" is the latent that came in."""
        self._work(model_wrap, extra_args["model_options"])
        return latent_image


def with_teacher(model: Any, samples: TeacherSamples, work: Callable[[ComfyTeacher], T]) -> T:
    """Load a model, call `work` with it and its samples, and return what it returns; the model stays unchanged.

    Args:
        model: a model patcher, as it was loaded, with whatever LoRAs it carries.
        samples: made by it.
        work: called outside inference mode, with gradients enabled.
    """
    patched, runtime = watched(model)
    results: list[T] = []

    def run(guider: Any, options: dict[str, Any]) -> None:
        results.append(work(ComfyTeacher(guider, runtime, options, samples, patched.load_device)))

    run_session(patched, runtime, samples, run)
    return results[0]


def run_session(
    patched: Any, runtime: Runtime, samples: TeacherSamples, run: Callable[[Any, dict[str, Any]], None]
) -> None:
    """Call `run(guider, model options)` while the core has a model in place for sampling; end `runtime`'s run then."""
    with torch.inference_mode(False), torch.enable_grad():
        guider = comfy.samplers.CFGGuider(patched)
        # the core loads the ControlNets that it is shown, and cleans them up; beside which text does not matter
        nets, first = samples.control_nets() or [{}], samples.conditioning(0)
        shown = [from_conditioning(replace(first, live=live)) for live in nets]
        guider.inner_set_conds({"positive": [entry for entries in shown for entry in entries]})
        latent = samples.latent(0)
        sigmas = torch.tensor([1.0, 0.0])
        try:
            guider.sample(torch.zeros_like(latent), latent, _Session(run), sigmas, disable_pbar=True, seed=0)
        finally:
            runtime.finish_run()
