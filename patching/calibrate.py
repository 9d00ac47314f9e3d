"""Samples a model once, shows its attention calls to a watch, and runs the whole model with the plans that it suggests.

All of it is one sampling to ComfyUI, which loads the model, prepares the conditionings, runs hooks and ControlNets, and
cleans up. The steps are Euler's, whatever sampler the user takes afterwards: kinds are compared on the same inputs.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from torch import Tensor

from ..attention.calibration.choice import MORE_CHECKS, Choice, Target, choose
from ..attention.calibration.file import Calibration
from ..attention.calibration.measures import Checked
from ..attention.calibration.state import State, read_state, write_state
from ..attention.calibration.times import Milliseconds
from ..attention.calibration.watch import SiteWatch
from ..attention.runtime.runtime import Runtime, SiteSettings
from ..attention.runtime.seconds import wait_for
from ..attention.specs import SiteSpec, Spec
from ..attention.words import time_left
from .patcher import attention_below, compute_dtype, stop_if_interrupted, watched

LEAST_STEPS = 4
FIRST_WATCHED = 2  # the first step warms up and times calls, the second is left alone for its own time
CHECKED = (0.35, 0.75)  # of the steps: where plans are compared with the dense model
SHARE_OF_WATCHING = 0.25  # of the time of the steps, for comparing outputs


@dataclass(frozen=True, slots=True, eq=False)
class Sampling:
    """What is sampled.

    Args:
        positive, negative: conditionings; negative None samples without guidance.
        cfg: of the guidance.
        steps: of the sampling.
        seed: of the noise.
        part: first and last of these steps, for models that make a part of them; None is all.
    """

    positive: Any
    negative: Any = None
    cfg: float = 1.0
    steps: int = 8
    seed: int = 0
    part: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """What came out.

    Args:
        calibration: what was measured and chosen.
        choice: the same choice.
        latent: what the steps left, for a second model that goes on from there.
    """

    calibration: Calibration
    choice: Choice
    latent: Tensor


def calibrate(
    model: Any,
    latent: Any,
    sampling: Sampling,
    candidates: Sequence[Spec],
    target: Target,
    *,
    most_checks: int = 4,
    show: Callable[[str], None] = lambda _: None,
    state: Path | None = None,
    noise: Any = None,
) -> Calibrated:
    """Measure candidates on a model's own sampling and choose what each site runs; the model stays unchanged.

    Args:
        model: a model patcher, with whatever other nodes put on it.
        latent: to sample, one of a batch, (1, C, ...); nested for models with several.
        sampling: how.
        candidates: specs.
        target: what is asked for.
        most_checks: plans that the whole model runs with, two forwards each.
        show: told what happens, and how long it still takes.
        state: file of a sampling that was interrupted, written as it goes and removed in the end; None keeps none.
        noise: None takes that of the seed, zeros go on from `latent`.

    Raises:
        ValueError: no host knows the model, or its attention did not reach the pack.
        InterruptProcessingException: the user cancelled; the steps so far are kept.
    """
    patched, runtime = watched(model)
    sigmas = _sigmas(patched, sampling)
    work = _Work(patched, runtime, candidates, target, most_checks, show, state, len(sigmas) - 1)
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(sampling.positive, sampling.positive if sampling.negative is None else sampling.negative)
    guider.set_cfg(1.0 if sampling.negative is None else sampling.cfg)
    noise = comfy.sample.prepare_noise(latent, sampling.seed) if noise is None else noise
    preview = latent_preview.prepare_callback(patched, len(sigmas) - 1)
    try:
        result = guider.sample(
            noise, latent, comfy.samplers.KSAMPLER(work), sigmas, callback=preview,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=sampling.seed,
        )  # fmt: skip
    finally:
        runtime.finish_run()
    assert work.choice is not None
    if state is not None:
        state.unlink(missing_ok=True)
    shape = tuple((latent.unbind()[0] if latent.is_nested else latent).shape[1:])
    calibration = Calibration(
        shape, len(sigmas) - 1, work.step_seconds, time.monotonic() - work.began, time.time(), work.watch.result(),
        work.choice.weights, {target: (work.choice.specs, work.choice.checked)},
    )  # fmt: skip
    return Calibrated(calibration, work.choice, result)


def _sigmas(model: Any, sampling: Sampling) -> Tensor:
    schedule = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", sampling.steps)
    first, last = sampling.part or (0, len(schedule) - 1)
    return schedule[first : last + 1]


@dataclass(slots=True)
class _Work:
    """The work of one sampling, called where the core expects the function of a sampler."""

    model: Any
    runtime: Runtime
    candidates: Sequence[Spec]
    target: Target
    most_checks: int
    show: Callable[[str], None]
    state: Path | None
    steps: int
    began: float = field(default_factory=time.monotonic)
    step_seconds: float = 0.0
    choice: Choice | None = None
    watch: SiteWatch = field(init=False)
    points: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # latent, sigma, denoised

    def __post_init__(self) -> None:
        sites = self.runtime.host.sites(self.model.get_model_object("diffusion_model"))
        self.watch = SiteWatch(sites, self.candidates, self.runtime.memory, stop_if_interrupted)

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, disable: Any = None
    ) -> Tensor:
        """Sample, watch, choose; return the latent."""
        x, first = self._resumed(x)
        for step, (at, sigma, _) in self.points.items():  # strengths of LoRAs may be others than in the first part
            stop_if_interrupted()
            self.points[step] = at, sigma, model(at, sigma * at.new_ones([at.shape[0]]), **extra_args)
        times: list[float] = []
        for step in range(first, self.steps):
            stop_if_interrupted()
            denoised, seconds = self._step(model, x, sigmas[step], extra_args, step)
            times.append(seconds)
            if len(times) > 1:
                self.step_seconds = min(seconds, self.step_seconds or seconds)
            if step in self._checked_steps():
                self.points[step] = (x, sigmas[step], denoised)
            if callback is not None:
                callback({"i": step, "denoised": denoised, "x": x, "sigma": sigmas[step], "sigma_hat": sigmas[step]})
            x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
            self._keep(x, step + 1)
            self._tell(step + 1)
        self._choose(model, extra_args)
        return x

    def _checked_steps(self) -> set[int]:
        return {min(self.steps - 1, max(1, round(share * self.steps))) for share in CHECKED}

    def _step(
        self, model: Any, x: Tensor, sigma: Tensor, extra_args: dict[str, Any], step: int
    ) -> tuple[Tensor, float]:
        """Return what the dense model makes of a step, and its seconds without those of the watch."""
        device, spent = x.device, self.watch.spent
        is_first = not self.watch.seen.shapes
        if is_first or step >= FIRST_WATCHED:
            self.watch.begin_step(0 if is_first else self._stride())
            self.runtime.observe = self.watch.see
        wait_for(device)
        began = time.perf_counter()
        try:
            denoised = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            wait_for(device)
        finally:
            self.runtime.observe = None
        return denoised, time.perf_counter() - began - (self.watch.spent - spent)

    def _stride(self) -> int:
        """Return of how many sites one is compared in each step, so that all of it costs a share of the steps."""
        watched = max(self.steps - FIRST_WATCHED, 1)
        allowed = SHARE_OF_WATCHING * self.steps * self.step_seconds
        needed = watched * self.watch.seconds_to_compare()
        return max(1, min(watched, round(needed / allowed))) if allowed > 0 else watched

    def _choose(self, model: Any, extra_args: dict[str, Any]) -> None:
        sites = self.watch.result()
        if not sites:
            raise ValueError("the model's attention did not reach this node, so that nothing could be measured")
        checks = 0

        def check(specs: Mapping[str, SiteSpec]) -> Checked:
            nonlocal checks
            checks += 1
            most = self.most_checks + (MORE_CHECKS if checks > self.most_checks else 0)
            self.show(f"calibrating: checking plan {checks} of up to {most} on the whole model")
            return self._check(model, extra_args, specs)

        self.choice = choose(sites, self.target, check, self.most_checks, self.step_seconds or math.inf)

    def _check(self, model: Any, extra_args: dict[str, Any], specs: Mapping[str, SiteSpec]) -> Checked:
        errors, times = [], []
        self.runtime.sites = {site: SiteSettings(spec) for site, spec in specs.items()}
        try:
            for x, sigma, dense in self.points.values():
                stop_if_interrupted()
                wait_for(x.device)
                began = time.perf_counter()
                found = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
                wait_for(x.device)
                times.append(time.perf_counter() - began)
                # velocities are (latent - denoised) / sigma, so sigma cancels out
                missed, whole = (found - dense).float().square().sum(), (x - dense).float().square().sum()
                errors.append(float(missed / whole))
        finally:
            self.runtime.sites = {}
        return Checked(sum(errors) / len(errors), min(times))

    def _tell(self, done: int) -> None:
        spent = time.monotonic() - self.began
        left = (self.steps - done) * spent / done + 2 * self.most_checks * self.step_seconds
        rest = time_left(left) if self.step_seconds else "about as long as 20 steps in all"
        self.show(f"calibrating: step {done} of {self.steps}, {rest}")

    def _keep(self, x: Tensor, done: int) -> None:
        if self.state is not None:
            with contextlib.suppress(OSError, ValueError):  # a cancel then costs the steps so far, and nothing else
                spent = time.monotonic() - self.began
                write_state(self.state, State(done, self.step_seconds, spent, x, self.points, self.watch.seen))

    def _resumed(self, x: Tensor) -> tuple[Tensor, int]:
        """Return the latent and the first step, as an interrupted sampling left them if there was one."""
        kept = None if self.state is None else read_state(self.state, x)
        if kept is None:
            return x, 0
        self.watch.seen = kept.seen
        self.points, self.step_seconds = dict(kept.points), kept.step_seconds
        self.began -= kept.spent
        self.show(f"calibrating: going on after step {kept.done} of {self.steps}")
        return kept.latent, kept.done


def milliseconds(model: Any) -> Milliseconds:
    """Return what counts the milliseconds of attention on a model's device, in its dtype, beside its own attention."""
    device = comfy.model_management.get_torch_device()
    return Milliseconds(attention_below(model), compute_dtype(model), device, stop_if_interrupted)
