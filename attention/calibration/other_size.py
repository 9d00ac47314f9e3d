"""What was measured at one size, worked out for another one: seconds grow as operations do, errors stay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..layout import Grid, Segment, TokenLayout
from ..planning.cost import attention_cost
from ..specs import DenseSpec, SiteSpec
from .file import Calibration
from .measures import Measure, SiteMeasures

FARTHEST = 2.0  # times as many cells of the latent, or as few; beyond that kinds compare otherwise


def nearest(calibrations: Mapping[str, Calibration], latent: Sequence[int]) -> Calibration | None:
    """Return the calibration whose latent is nearest in cells, None where none is near enough."""
    cells, found = math.prod(latent[1:]), []
    for each in calibrations.values():
        if len(each.latent) == len(latent):
            apart = abs(math.log(cells / math.prod(each.latent[1:])))
            if apart <= math.log(FARTHEST):
                found.append((apart, -each.at, each))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def at_latent(calibration: Calibration, latent: Sequence[int]) -> Calibration:
    """Return a calibration as it would be for another latent; what the whole model gave is left out.

    Args:
        calibration: as it was measured.
        latent: shape without the batch, of as many dimensions as the one that was measured.
    """
    scales = [new / old for new, old in zip(latent[1:], calibration.latent[1:], strict=True)]
    sites = tuple(_site(each, ([1.0] + scales)[-3:]) for each in calibration.sites)
    attention = [sum(each.calls * each.dense_seconds for each in of) for of in (calibration.sites, sites)]
    rest = max(calibration.step_seconds - attention[0], 0.0) * math.prod(scales)
    return replace(calibration, latent=tuple(latent), sites=sites, step_seconds=rest + attention[1], choices={})


def _site(measured: SiteMeasures, scales: Sequence[float]) -> SiteMeasures:
    if measured.layout is None:
        return measured
    layout = _scaled(measured.layout, scales)

    def growth(spec: SiteSpec) -> float:
        sizes = (measured.num_heads, measured.head_dim)
        assert measured.layout is not None
        return attention_cost(spec, layout, *sizes).flops / attention_cost(spec, measured.layout, *sizes).flops

    measures = tuple(Measure(each.spec, each.seconds * growth(each.spec), each.error) for each in measured.measures)
    dense = measured.dense_seconds * growth(DenseSpec())
    return replace(measured, dense_seconds=dense, measures=measures, layout=layout)


def _scaled(layout: TokenLayout, scales: Sequence[float]) -> TokenLayout:
    """Return a layout whose grids have other sides; text and references stay."""

    def grid_of(grid: Grid) -> Grid:
        frames, height, width = (max(1, round(side * scale)) for side, scale in zip(grid, scales, strict=True))
        return frames, height, width

    def segment_of(segment: Segment) -> Segment:
        if segment.grid is None:
            return segment
        grid = grid_of(segment.grid)
        return Segment(segment.role, math.prod(grid), grid)

    return TokenLayout(tuple(map(segment_of, layout.segments)))
