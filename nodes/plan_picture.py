"""The picture of a plan: one row per site, a grey bar for dense cost, a coloured one for the planned kind."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention.kinds.kind import KINDS
from ..attention.planning.report import SiteCost, describe_spec

BACKGROUND, INK, FULL = (250, 250, 248), (40, 40, 40), (222, 222, 218)
ROW, LEFT, WIDTH, TOP, RIGHT = 14, 90, 520, 34, 260


def draw_plan(title: str, rows: Sequence[SiteCost]) -> Tensor:
    """Return the map as an image tensor, (1, height, width, 3) in 0 to 1.

    Args:
        title: drawn above.
        rows: one per site, in the order of the model.
    """
    image = Image.new("RGB", (LEFT + WIDTH + RIGHT, TOP + ROW * len(rows) + 12), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.text((8, 8), f"{title}: FLOPs of each site, dense (grey) and planned", INK, font=font)
    longest = max(max(row.dense.flops, row.planned.flops) for row in rows)
    for number, row in enumerate(rows):
        top = TOP + ROW * number
        draw.text((8, top), row.site.id, INK, font=font)
        _bar(draw, top, row.dense.flops / longest, FULL)
        _bar(draw, top, row.planned.flops / longest, colour_of(row.spec.kind))
        share = row.planned.flops / row.dense.flops
        draw.text((LEFT + WIDTH + 8, top), f"{share:6.1%}  {describe_spec(row.spec)}", INK, font=font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def colour_of(kind: str) -> tuple[int, int, int]:
    """Return the colour of a kind; heads of several kinds have that of dense attention."""
    return KINDS.get(kind, KINDS["dense"]).colour


def _bar(draw: ImageDraw.ImageDraw, top: int, share: float, colour: tuple[int, int, int]) -> None:
    draw.rectangle((LEFT, top + 2, LEFT + max(1, round(WIDTH * share)), top + ROW - 3), fill=colour)
