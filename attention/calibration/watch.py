"""Measures candidates on the attention calls of a model that samples: seconds once a shape, errors site by site.

Seconds depend on shape, layout and dtype only, so they are measured at the first call of each. Errors are measured on
the whole output of the backend that would run, and compared on some hundred queries.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..hosts.base import Site
from ..kinds.kind import Learned
from ..layout import TokenLayout
from ..memory import LongLived
from ..planning.report import describe_spec
from ..runtime.backends import AUTO, CallShape, choose_backend
from ..runtime.decisions import why_failed
from ..runtime.record import once
from ..runtime.seconds import timed, wait_for
from ..site_call import SiteCall, unusable
from ..specs import Spec
from .measures import PAYS, Measure, SiteMeasures

QUERIES = 512  # on a grid, that outputs are compared on
TURNS, REPEATS = 2, 2  # of a measurement of seconds
LONG_S = 0.15  # of all repeats of a call, after which there is no further one


@dataclass(frozen=True, slots=True)
class ShapeKey:
    """What the seconds of a call depend on: (B, H, N, D), the layout, the dtype's name."""

    shape: tuple[int, ...]
    layout: TokenLayout
    dtype: str


@dataclass(slots=True)
class TimedShape:
    """Seconds of calls of one shape: dense, and by candidate."""

    dense: float
    seconds: dict[Spec, float] = field(default_factory=dict)

    def worthwhile(self) -> list[Spec]:
        """Return the candidates whose errors are worth a measurement, for they are faster than dense."""
        return [spec for spec, seconds in self.seconds.items() if seconds < PAYS * self.dense]


@dataclass(slots=True)
class Seen:
    """All that a watch has seen, so that it can go on from there.

    Args:
        steps: that were watched.
        calls: by site.
        reasons: by site, why it cannot be measured.
        shapes: what was timed.
        shape_of: by site, the shape of its calls.
        sums: by site and candidate, the energies that its outputs miss, and those of the dense outputs.
        stride: of how many sites one is compared in a step; 0 until one was.
    """

    steps: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    shapes: dict[ShapeKey, TimedShape] = field(default_factory=dict)
    shape_of: dict[str, ShapeKey] = field(default_factory=dict)
    sums: dict[str, dict[Spec, tuple[float, float]]] = field(default_factory=dict)
    stride: int = 0


class SiteWatch:
    """Measures while it is shown calls; `see` is what a runtime's `observe` takes.

    Args:
        sites: of the model.
        candidates: specs, without learned parameters.
        memory: keeps tables between calls.
        stop: raises where the user cancelled.
    """

    def __init__(
        self, sites: Sequence[Site], candidates: Sequence[Spec], memory: LongLived, stop: Callable[[], None]
    ) -> None:
        self.sites, self.candidates = {site.id: site for site in sites}, tuple(candidates)
        self.spent = 0.0  # seconds of all that was measured
        self.seen = Seen()
        self._order = {site.id: number for number, site in enumerate(sites)}
        self._memory, self._stop = memory, stop
        self._stride = 0

    def begin_step(self, stride: int = 0) -> None:
        """Begin a step in which every `stride`-th site is measured, others than in the step before; 0 measures none.

        The first one above 0 holds for all later steps, or some sites might never have their turn.
        """
        self.seen.stride = self.seen.stride or stride
        self.seen.steps, self._stride = self.seen.steps + 1, stride and self.seen.stride

    def see(self, call: SiteCall) -> None:
        """Time the candidates on the first call of a shape, and compare their outputs where it is the site's turn."""
        self._stop()
        self.seen.calls[call.site] += 1
        if call.site in self.seen.reasons:
            return
        device = call.query.device
        wait_for(device)
        started = time.perf_counter()
        with self._memory.pause():
            self._measure(call)
        wait_for(device)
        self.spent += time.perf_counter() - started

    def _measure(self, call: SiteCall) -> None:
        reason = unusable(call)
        if reason is not None:
            self.seen.reasons[call.site] = reason.text
            return
        assert isinstance(call.layout, TokenLayout)
        key = ShapeKey(tuple(call.query.shape), call.layout, str(call.query.dtype))
        self.seen.shape_of[call.site] = key
        if key not in self.seen.shapes:
            self.seen.shapes[key] = self._timed(call)
        if self._stride and (self._order.get(call.site, 0) + self.seen.steps) % self._stride == 0:
            self._compare(call, self.seen.shapes[key].worthwhile())

    def seconds_to_compare(self) -> float:
        """Return the seconds that one step takes in which all sites are measured."""
        total = 0.0
        for site, key in self.seen.shape_of.items():
            shape = self.seen.shapes[key]
            total += self._calls_a_step(site) * sum(shape.seconds[spec] for spec in shape.worthwhile())
        return total

    def result(self) -> tuple[SiteMeasures, ...]:
        """Return what was measured, in the order of the model; sites that were never called are left out."""
        return tuple(self._site(site) for site in self.sites.values() if self.seen.calls[site.id])

    def _calls_a_step(self, site: str) -> float:
        return self.seen.calls[site] / max(self.seen.steps, 1)

    def _site(self, site: Site) -> SiteMeasures:
        calls, key = self._calls_a_step(site.id), self.seen.shape_of.get(site.id)
        if key is None or site.id in self.seen.reasons:
            return SiteMeasures(site.id, calls, 0.0, reason=self.seen.reasons.get(site.id, "it was not seen"))
        shape, own = self.seen.shapes[key], self.seen.sums.get(site.id, {})
        if not own and shape.worthwhile():
            reason = "its attention was called in the first step only, where nothing is compared"
            return SiteMeasures(site.id, calls, shape.dense, layout=key.layout, reason=reason)
        measures = []
        for spec, seconds in shape.seconds.items():
            missed, whole = own.get(spec, (math.nan, 1.0))
            measures.append(Measure(spec, seconds, missed / whole if whole else math.nan))
        return SiteMeasures(site.id, calls, shape.dense, tuple(measures), key.layout, site.num_heads, site.head_dim)

    def _timed(self, call: SiteCall) -> TimedShape:
        """Time dense attention and all candidates in turns: a busy moment of the machine misleads one turn only."""
        assert call.again is not None
        runs: dict[Spec | None, Callable[[], Any]] = {None: call.again}
        runs |= {spec: partial(self._run, call, spec) for spec in self.candidates}
        least: dict[Spec | None, float] = {}
        for _ in range(TURNS):
            for spec, run in list(runs.items()):
                self._stop()
                try:
                    seconds = call_seconds(call.query.device, run, is_warm=spec in least)
                except Exception as error:  # whatever a device or driver throws: it is no candidate here
                    if spec is None:
                        raise
                    _log(spec, error)
                    del runs[spec]
                    least.pop(spec, None)
                else:
                    least[spec] = min(seconds, least.get(spec, seconds))
        return TimedShape(least[None], {spec: seconds for spec, seconds in least.items() if spec is not None})

    def _run(self, call: SiteCall, spec: Spec) -> Tensor:
        assert isinstance(call.layout, TokenLayout)
        batch, heads, tokens, size = call.query.shape
        facts = CallShape(spec, call.layout, (batch, heads, tokens, size), call.query.dtype, call.query.device)
        backend, reasons = choose_backend(facts)
        if backend is None:
            raise ValueError("; ".join(map(str, reasons)))
        inputs = (call.query, call.key, call.value)
        return backend.run(*inputs, facts, scale=call.scale, learned=Learned(), memory=self._memory)

    def _compare(self, call: SiteCall, specs: Sequence[Spec]) -> None:
        rows = call.grid_tokens()
        rows = rows[:: max(1, len(rows) // QUERIES) | 1]  # an odd step meets every column of an even grid
        wanted = call.output.index_select(2, rows).float()
        whole = float(wanted.square().sum())
        own = self.seen.sums.setdefault(call.site, {})
        for spec in specs:
            self._stop()
            try:
                found = self._run(call, spec).index_select(2, rows).float()
            except Exception as error:
                _log(spec, error)
                own[spec] = (math.inf, 1.0)
                continue
            missed, before = own.get(spec, (0.0, 0.0))
            own[spec] = (missed + float((found - wanted).square().sum()), before + whole)


def call_seconds(device: torch.device, compute: Callable[[], Any], *, is_warm: bool = False) -> float:
    """Return the seconds of a computation: the least of some repeats, behind a first one unless `is_warm`."""
    if not is_warm:
        compute()
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < LONG_S:
        times.append(timed(device, compute)[0])
    return min(times)


def _log(spec: Spec, error: Exception) -> None:
    reason = why_failed(AUTO, error)
    once.info(f"Linearize: {describe_spec(spec)} could not be measured: {reason.text}")
