"""What was measured of a model's sites, as data: seconds and errors of every candidate, and of a whole plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..layout import TokenLayout
from ..planning.knapsack import Option, SiteOptions
from ..plans import SiteMeasured
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


def measured_sites(sites: Sequence[SiteMeasures], specs: Mapping[str, SiteSpec], where: str) -> dict[str, SiteMeasured]:
    """Return by site what was measured of what it runs; a site that `specs` leaves out is dense.

    Args:
        where: when, on what and at which size, in words.
    """
    found = {}
    for each in sites:
        dense = each.calls * each.dense_seconds
        own = next((one for one in each.measures if one.spec == specs.get(each.site)), None)
        seconds, error = (dense, 0.0) if own is None else (each.calls * own.seconds, own.error)
        found[each.site] = SiteMeasured(seconds, dense, error, where)
    return found


def attention_seconds(measured: Mapping[str, SiteMeasured]) -> tuple[float, float]:
    """Return the seconds that a step's attention takes as planned, and dense."""
    return sum(each.seconds for each in measured.values()), sum(each.dense_seconds for each in measured.values())
