"""The picture of a student's errors: a bar per candidate, grouped by site, on a logarithmic scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention.planning.report import describe_spec
from ..attention.specs import SiteSpec
from ..attention.students.candidates import Candidate
from .plan_picture import BACKGROUND, FULL, INK, colour_of

LEFT, WIDTH, MARGIN = 90, 560, 8
LINE, BAR, GAP = 14, 6, 5  # heights: of a line of text, of a bar, between sites
LIGHTEST = 0.65  # how far the last of several specs of one kind is from its colour to white
LARGEST_DECADES = 6


@dataclass(frozen=True, slots=True)
class Scale:
    """Powers of ten from `lowest` to `highest`, on an axis that is `WIDTH` pixels long."""

    lowest: int
    highest: int

    @classmethod
    def of(cls, errors: Sequence[float]) -> "Scale":
        """Return the scale that shows errors above 0 from decade to decade, of tiny ones only the upper end."""
        logs = [math.log10(error) for error in errors if 0 < error < math.inf] or [0.0]
        highest = math.ceil(max(logs) + 1e-9)
        return cls(max(math.floor(min(logs) - 1e-9), highest - LARGEST_DECADES), highest)

    def pixels(self, error: float) -> int:
        """Return the length of a bar, at least 1."""
        if error <= 0:
            return 1
        share = (math.log10(error) - self.lowest) / (self.highest - self.lowest)
        return max(1, round(WIDTH * min(max(share, 0.0), 1.0)))


def spec_colours(specs: Sequence[SiteSpec]) -> dict[SiteSpec, tuple[int, int, int]]:
    """Return a colour per spec: that of its kind, lighter from one spec of the kind to the next."""
    kinds: dict[str, list[SiteSpec]] = {}
    for spec in specs:
        kinds.setdefault(spec.kind, []).append(spec)
    colours = {}
    for kind, of_kind in kinds.items():
        base = colour_of(kind)
        for number, spec in enumerate(of_kind):
            lighter = LIGHTEST * number / max(1, len(of_kind) - 1)
            red, green, blue = (round(part + (255 - part) * lighter) for part in base)
            colours[spec] = (red, green, blue)
    return colours


def draw_errors(title: str, sites: Mapping[str, Sequence[Candidate]]) -> Tensor:
    """Return the picture as an image tensor, (1, height, width, 3) in 0 to 1.

    Args:
        title: drawn above.
        sites: candidates by site, at least one each; those without a measured error have no bar.
    """
    specs = list(dict.fromkeys(each.spec for candidates in sites.values() for each in candidates))
    colours = spec_colours(specs)
    scale = Scale.of([each.error for candidates in sites.values() for each in candidates])
    heights = [max(LINE, len(candidates) * BAR) + GAP for candidates in sites.values()]
    top = 4 * MARGIN + LINE + LINE * len(specs) + LINE
    bottom = top + sum(heights)
    font = ImageFont.load_default(11)
    longest = math.ceil(max(font.getlength(f"0.00000, {describe_spec(spec)}") for spec in specs))
    size = LEFT + WIDTH + 3 * MARGIN + longest, bottom + LINE + MARGIN
    image = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), f"{title}: error of each site, log scale, shorter is better", INK, font=font)
    for number, (spec, colour) in enumerate(colours.items()):
        y = 2 * MARGIN + LINE * (number + 1)
        draw.rectangle((LEFT, y + 2, LEFT + 20, y + LINE - 4), fill=colour)
        draw.text((LEFT + 28, y), describe_spec(spec), INK, font=font)
    _axis(draw, font, scale, top, bottom)
    draw.text((LEFT + WIDTH + 3 * MARGIN, top - LINE - 2), "lowest", INK, font=font)
    for (site, candidates), height in zip(sites.items(), heights, strict=True):
        _site(draw, font, scale, colours, site, candidates, top, height)
        top += height
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def _axis(draw: ImageDraw.ImageDraw, font, scale: Scale, top: int, bottom: int) -> None:
    for power in range(scale.lowest, scale.highest + 1):
        x = LEFT + round(WIDTH * (power - scale.lowest) / (scale.highest - scale.lowest))
        draw.line((x, top - 2, x, bottom), fill=FULL)
        for y in (top - LINE - 2, bottom):
            draw.text((x, y), f"{10.0**power:g}", INK, font=font, anchor="ma")


def _site(
    draw: ImageDraw.ImageDraw,
    font,
    scale: Scale,
    colours: Mapping[SiteSpec, tuple[int, int, int]],
    site: str,
    candidates: Sequence[Candidate],
    top: int,
    height: int,
) -> None:
    """Draw one site: its name, a bar per candidate, and the lowest error with its spec."""
    room = height - GAP
    middle = top + room / 2
    draw.text((MARGIN, middle), site, INK, font=font, anchor="lm")
    first = top + (room - BAR * len(candidates)) // 2
    for number, each in enumerate(candidates):
        if math.isfinite(each.error):
            y = first + BAR * number
            draw.rectangle((LEFT, y, LEFT + scale.pixels(each.error), y + BAR - 2), fill=colours[each.spec])
    measured = [each for each in candidates if math.isfinite(each.error)]
    best = min(measured, key=lambda each: each.error, default=None)
    text = f"{best.error:.2g}, {describe_spec(best.spec)}" if best else "not measured"
    draw.text((LEFT + WIDTH + 3 * MARGIN, middle), text, INK, font=font, anchor="lm")
