"""What was measured of a model's sites, as data: seconds and errors of every candidate, and of a whole plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..layout import TokenLayout
from ..planning.knapsack import Option, SiteOptions
from ..specs import SiteSpec

NANOSECOND = 1e-9
PAYS = 0.97  # of the dense seconds; a candidate above it may be no faster: noise of a measurement


@dataclass(frozen=True, slots=True)
class Measure:
    """One candidate at one site.

    Args:
        spec: of the candidate.
        seconds: of one attention call.
        error: energy of what its output misses over the energy of the dense output; NaN where it was not measured
            because the candidate is no faster than dense.
    """

    spec: SiteSpec
    seconds: float
    error: float = math.nan


@dataclass(frozen=True, slots=True)
class SiteMeasures:
    """One site.

    Args:
        site: its id.
        calls: attention calls a step.
        dense_seconds: of one dense call, as the user runs it.
        measures: of the candidates.
        layout: the tokens of a call; None where the site stays dense.
        num_heads, head_dim: of the site.
        reason: why it stays dense whatever was measured, or empty.
    """

    site: str
    calls: float
    dense_seconds: float
    measures: tuple[Measure, ...] = ()
    layout: TokenLayout | None = None
    num_heads: int = 1
    head_dim: int = 1
    reason: str = ""

    @property
    def usable(self) -> tuple[Measure, ...]:
        """The candidates that are faster than dense and whose error is known."""
        return tuple(
            each
            for each in self.measures
            if each.seconds < PAYS * self.dense_seconds and math.isfinite(each.error) and not self.reason
        )

    def options(self, weight: float = 1.0) -> SiteOptions:
        """Return what the exact choice takes: nanoseconds a step, and errors times `weight`."""
        scale = self.calls / NANOSECOND
        found = tuple(
            Option(number, each.spec, each.error * weight, round(each.seconds * scale))
            for number, each in enumerate(self.usable)
        )
        return SiteOptions(self.site, max(round(self.dense_seconds * scale), 1), found)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a few forwards of the whole model with a plan gave.

    Args:
        error: of the velocity against the dense model's, energy over energy, the mean of the noise levels.
        seconds: of a step.
    """

    error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SiteMeasured:
    """What is known of the spec that a site runs, for reports.

    Args:
        seconds, dense_seconds: of its attention calls in one step.
        error: as in `Measure`.
    """

    seconds: float
    dense_seconds: float
    error: float


def attention_seconds(sites: Sequence[SiteMeasures], specs: Mapping[str, SiteSpec]) -> tuple[float, float]:
    """Return the seconds that a step's attention takes with a plan, and dense."""
    dense = sum(each.calls * each.dense_seconds for each in sites)
    return sum(each.seconds for each in measured_sites(sites, specs).values()), dense


def measured_sites(sites: Sequence[SiteMeasures], specs: Mapping[str, SiteSpec]) -> dict[str, SiteMeasured]:
    """Return by site what was measured of what it runs; a site that `specs` leaves out is dense."""
    found = {}
    for each in sites:
        dense = each.calls * each.dense_seconds
        own = next((one for one in each.measures if one.spec == specs.get(each.site)), None)
        found[each.site] = (
            SiteMeasured(dense, dense, 0.0)
            if own is None
            else SiteMeasured(each.calls * own.seconds, dense, own.error)
        )
    return found
