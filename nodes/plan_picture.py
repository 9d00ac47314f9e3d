"""The picture of a plan: one row per site, a grey bar for dense cost, a coloured one for the planned kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention.kinds.kind import KINDS
from ..attention.planning.report import SiteCost, describe_spec
from ..attention.plans import SiteMeasured
from ..attention.specs import SiteSpec

BACKGROUND, INK, FULL = (250, 250, 248), (40, 40, 40), (222, 222, 218)
ROW, LEFT, WIDTH, TOP, RIGHT = 14, 90, 520, 34, 340


@dataclass(frozen=True, slots=True)
class Row:
    """One site of the picture: its spec, what dense attention and the planned one take, a text behind them."""

    site: str
    spec: SiteSpec
    dense: float
    planned: float
    text: str


def draw_plan(title: str, rows: Sequence[SiteCost], measured: Mapping[str, SiteMeasured] | None = None) -> Tensor:
    """Return the map of FLOPs as an image tensor, (1, height, width, 3) in 0 to 1.

    Args:
        title: drawn above.
        rows: one per site, in the order of the model.
        measured: by site, what was measured of what it runs.
    """

    def text(row: SiteCost) -> str:
        known = (measured or {}).get(row.site.id)
        beside = f", {_milliseconds(known)}" if known is not None else ""
        return f"{row.planned.flops / row.dense.flops:6.1%}  {describe_spec(row.spec)}{beside}"

    shown = [Row(each.site.id, each.spec, each.dense.flops, each.planned.flops, text(each)) for each in rows]
    return _draw(f"{title}: FLOPs of each site, dense (grey) and planned", shown)


def draw_measured(title: str, measured: Mapping[str, SiteMeasured], specs: Mapping[str, SiteSpec]) -> Tensor:
    """Return the map of measured milliseconds, as `draw_plan` does that of FLOPs.

    Args:
        title: drawn above.
        measured, specs: by site, in the order of the model.
    """
    rows = [
        Row(site, specs[site], each.dense_seconds, each.seconds, f"{_milliseconds(each)}  {describe_spec(specs[site])}")
        for site, each in measured.items()
    ]
    return _draw(f"{title}: milliseconds of each site, dense (grey) and chosen", rows)


def _milliseconds(measured: SiteMeasured) -> str:
    return f"{1000 * measured.seconds:.1f} of {1000 * measured.dense_seconds:.1f} ms"


def _draw(title: str, rows: Sequence[Row]) -> Tensor:
    image = Image.new("RGB", (LEFT + WIDTH + RIGHT, TOP + ROW * len(rows) + 12), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.text((8, 8), title, INK, font=font)
    longest = max((max(row.dense, row.planned) for row in rows), default=0) or 1
    for number, row in enumerate(rows):
        top = TOP + ROW * number
        draw.text((8, top), row.site, INK, font=font)
        _bar(draw, top, row.dense / longest, FULL)
        _bar(draw, top, row.planned / longest, colour_of(row.spec.kind))
        draw.text((LEFT + WIDTH + 8, top), row.text, INK, font=font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def colour_of(kind: str) -> tuple[int, int, int]:
    """Return the colour of a kind; heads of several kinds have that of dense attention."""
    return KINDS.get(kind, KINDS["dense"]).colour


def _bar(draw: ImageDraw.ImageDraw, top: int, share: float, colour: tuple[int, int, int]) -> None:
    draw.rectangle((LEFT, top + 2, LEFT + max(1, round(WIDTH * share)), top + ROW - 3), fill=colour)
