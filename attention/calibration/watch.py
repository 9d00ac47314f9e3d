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
REPEATS = 3
LONG_S = 0.5  # of one call, after which it is not repeated


@dataclass(slots=True)
class _Shape:
    """What was timed for calls of one shape."""

    dense: float
    seconds: dict[Spec, float] = field(default_factory=dict)

    def worthwhile(self) -> list[Spec]:
        """Return the candidates whose errors are worth a measurement, for they are faster than dense."""
        return [spec for spec, seconds in self.seconds.items() if seconds < PAYS * self.dense]


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
        self.sums: dict[str, dict[Spec, list[float]]] = {}  # by site and candidate: energies missed, and of the output
        self.reasons: dict[str, str] = {}
        self._order = {site.id: number for number, site in enumerate(sites)}
        self._memory, self._stop = memory, stop
        self._shapes: dict[Any, _Shape] = {}
        self._shape_of: dict[str, Any] = {}
        self._layouts: dict[str, TokenLayout] = {}
        self._calls: Counter[str] = Counter()
        self._steps, self._stride = 0, 0

    def begin_step(self, stride: int = 0) -> None:
        """Begin a step in which every `stride`-th site is measured, others than in the step before; 0 measures none."""
        self._steps, self._stride = self._steps + 1, stride

    def see(self, call: SiteCall) -> None:
        """Time the candidates on the first call of a shape, and compare their outputs where it is the site's turn."""
        self._stop()
        self._calls[call.site] += 1
        if call.site in self.reasons:
            return
        device = call.query.device
        wait_for(device)
        started = time.perf_counter()
        with self._memory.pause():
            self._measure(call)
        wait_for(device)
        self.spent += time.perf_counter() - started

    def _measure(self, call: SiteCall) -> None:
        key = (tuple(call.query.shape), call.layout, call.query.dtype)
        if key not in self._shapes or self._shape_of.get(call.site) != key:
            reason = unusable(call)
            if reason is not None:
                self.reasons[call.site] = reason.text
                return
            assert isinstance(call.layout, TokenLayout)
            self._shape_of[call.site], self._layouts[call.site] = key, call.layout
        if key not in self._shapes:
            self._shapes[key] = self._timed(call)
        if self._stride and (self._order.get(call.site, 0) + self._steps) % self._stride == 0:
            self._compare(call, self._shapes[key].worthwhile())

    def seconds_to_compare(self) -> float:
        """Return the seconds that one step takes in which all sites are measured."""
        return sum(
            self._calls[site] / max(self._steps, 1) * sum(self._shapes[key].seconds[s] for s in shape.worthwhile())
            for site, key in self._shape_of.items()
            if (shape := self._shapes[key])
        )

    def result(self) -> tuple[SiteMeasures, ...]:
        """Return what was measured, in the order of the model; sites that were never called are left out."""
        return tuple(self._site(site) for site in self.sites.values() if self._calls[site.id])

    def _site(self, site: Site) -> SiteMeasures:
        calls = self._calls[site.id] / max(self._steps, 1)
        shape = self._shapes.get(self._shape_of.get(site.id))
        if shape is None or site.id in self.reasons:
            return SiteMeasures(site.id, calls, 0.0, reason=self.reasons.get(site.id, "it was not seen"))
        found = []
        for spec, seconds in shape.seconds.items():
            missed, whole = self.sums.get(site.id, {}).get(spec, (math.nan, 1.0))
            found.append(Measure(spec, seconds, missed / whole if whole else math.nan))
        layout = self._layouts[site.id]
        return SiteMeasures(site.id, calls, shape.dense, tuple(found), layout, site.num_heads, site.head_dim)

    def _timed(self, call: SiteCall) -> _Shape:
        assert call.again is not None
        device = call.query.device
        shape = _Shape(call_seconds(device, call.again))
        for spec in self.candidates:
            self._stop()
            run = partial(self._run, call, spec)
            try:
                shape.seconds[spec] = call_seconds(device, run)
            except Exception as error:  # whatever a device or driver throws: it is no candidate here
                _log(spec, error)
        return shape

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
        own = self.sums.setdefault(call.site, {})
        for spec in specs:
            self._stop()
            try:
                found = self._run(call, spec).index_select(2, rows).float()
            except Exception as error:
                _log(spec, error)
                own[spec] = [math.inf, 1.0]
                continue
            sums = own.setdefault(spec, [0.0, 0.0])
            sums[0] += float((found - wanted).square().sum())
            sums[1] += whole


def call_seconds(device: torch.device, compute: Callable[[], Any]) -> float:
    """Return the seconds of a computation that has run once: the least of some, of a long one the first."""
    compute()
    least = math.inf
    for _ in range(REPEATS):
        least = min(least, timed(device, compute)[0])
        if least > LONG_S:
            break
    return least


def _log(spec: Spec, error: Exception) -> None:
    reason = why_failed(AUTO, error)
    once.info(f"Linearize: {describe_spec(spec)} could not be measured: {reason.text}")
