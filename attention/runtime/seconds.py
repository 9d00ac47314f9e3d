"""Seconds a step: measured while a model samples, for the plan and for dense attention.

A step is what a sampler asked for, however many forwards it took. The first one of a run warms up and is not counted
where there are others. A dense step is measured where one ran; else it is worked out of one dense call whose output is
thrown away, on a sixteenth of the queries or less where there are many.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .record import DenseSeconds, once

Result = TypeVar("Result")
TIMED_QUERIES = 4096  # of a dense call; more tell nothing new, since its time grows with their number


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step's time depends on beside the kind of attention.

    Args:
        model: architecture, sites, heads, dtype and device, in words.
        tokens: of a call.
        batch: of the latent.
    """

    model: str
    tokens: int
    batch: int


class Ledger(Protocol):
    """What is remembered of earlier runs on this machine, in seconds a forward: samplers take one a step, or more."""

    def dense(self, size: StepSize) -> DenseSeconds | None:
        """Return the last dense seconds of a forward of a model and size."""
        ...

    def note(self, size: StepSize, kind: str, planned: float | None, dense: DenseSeconds | None) -> None:
        """Remember the seconds of a run's forwards."""
        ...

    def break_even(self, model: str, kind: str, least: int) -> int:
        """Return the fewest tokens at which a kind was ever faster than dense here; `least`, or more, where none."""
        ...


@dataclass(frozen=True, slots=True)
class _Forward:
    began: float
    sigma: Tensor | None
    planned_calls: int  # that ran before it


@dataclass(slots=True)
class StepClock:
    """The forwards of one sampling run, and one dense call beside a planned one.

    Args:
        knows_dense: whether the dense seconds of this size are known, so that no call has to be timed.
        has_call: whether the call that ran last was timed.
    """

    knows_dense: bool = True
    has_call: bool = False
    _forwards: list[_Forward] = field(default_factory=list)
    _asked: Tensor | None = None  # the sampler's noise levels
    _planned_call: float = 0.0
    _dense_call: float = 0.0
    _spent: float = 0.0  # on a dense call, which is no part of a step

    def begin_forward(self, options: dict[str, Any], planned_calls: int) -> None:
        """Note a forward. Noise levels are read when the run ends: reading one waits for the device."""
        self._asked = options.get("sample_sigmas")
        self._forwards.append(_Forward(self._now(), options.get("sigmas"), planned_calls))

    def run_call(self, device: torch.device, compute: Callable[[], Result]) -> Result:
        """Return what a planned call computes; one a run is timed, none of the first forward."""
        self.has_call = False
        if self.knows_dense or len(self._forwards) < 2 or torch.is_grad_enabled() or is_recorded(device):
            return compute()
        self._planned_call, result = timed(device, compute)
        self.has_call = True
        return result

    def time_dense(self, device: torch.device, dense: Callable[[int], Any], queries: int) -> None:
        """Time dense attention for the call that was timed last; no other is timed in this run.

        Args:
            dense: computes it for some of the queries.
            queries: how many there are.
        """
        self.knows_dense, self.has_call = True, False
        few = queries if queries <= 2 * TIMED_QUERIES else TIMED_QUERIES
        started = time.perf_counter()
        try:
            if device.type != "cpu":
                dense(few)  # the first one chooses its kernel
            self._dense_call = timed(device, lambda: dense(few))[0] * queries / few
        except Exception as error:  # the picture does not need it
            once.info(f"Linearize: a dense call could not be timed: {type(error).__name__}")
        self._spent = time.perf_counter() - started

    def steps(self, planned_calls: int) -> tuple[float | None, DenseSeconds | None]:
        """Return the mean seconds of a step with planned calls, and of one without; the run ends now.

        Args:
            planned_calls: of the whole run.
        """
        begun = self._steps_begun()
        if len(begun) == 1 and len({_level(forward) for forward in self._forwards}) > 1:
            return None, None  # an adaptive sampler, whose levels are its own: nothing tells its steps apart
        ends = [*begun[1:], _Forward(self._now(), None, planned_calls)]
        found = [(b.began - a.began, b.planned_calls - a.planned_calls) for a, b in zip(begun, ends, strict=True)]
        counted = found[1:] or found
        planned = [seconds for seconds, calls in counted if calls]
        dense = [seconds for seconds, calls in counted if not calls]
        seconds = fmean(planned) if planned else None
        if dense:
            return seconds, DenseSeconds(fmean(dense))
        if seconds is None or not self._dense_call:
            return seconds, None
        calls = fmean(calls for _, calls in counted if calls)
        return seconds, DenseSeconds(max(seconds + calls * (self._dense_call - self._planned_call), 0.0), True)

    def forwards_a_step(self) -> float:
        """Return how many forwards a step took, on the mean."""
        return max(len(self._forwards), 1) / max(len(self._steps_begun()), 1)

    def _now(self) -> float:
        return time.perf_counter() - self._spent

    def _steps_begun(self) -> list[_Forward]:
        """Return the first forward of each step: where the noise level is one of the sampler's own, and a new one."""
        asked = set() if self._asked is None else {round(float(each), 6) for each in self._asked.flatten()}
        begun, last = [], None
        for forward in self._forwards:
            sigma = _level(forward)
            if not begun or (sigma != last and (sigma in asked or not asked)):
                begun.append(forward)
                last = sigma
        return begun


def _level(forward: _Forward) -> float | None:
    return None if forward.sigma is None else round(float(forward.sigma.max()), 6)


def timed(device: torch.device, compute: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds of a computation, the device's own work included, and its result."""
    wait_for(device)
    started = time.perf_counter()
    result = compute()
    wait_for(device)
    return time.perf_counter() - started, result


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device) if device.type != "mps" else torch.mps.synchronize()


def is_recorded(device: torch.device) -> bool:
    """Return whether a device records its work to repeat it, which waiting for it would break."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
