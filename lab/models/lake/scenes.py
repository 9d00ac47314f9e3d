"""Pictures of a lake, drawn by code: the data on which the demo's models are trained.

A scene is sky, sun or moon, land, a house and a tree on a shore, and a lake that mirrors all of it. A caption of nine
words names what is where. The rest is chance: the ridge line, sizes, places within a third. So a correct reflection has
to be looked up half a picture away, and a reader sees at once whether it was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TIMES = ("day", "dusk", "night")
PLACES = ("left", "middle", "right")
LANDS = ("mountains", "hills", "dunes")
COLOURS = ("red", "blue", "yellow", "white")
SIDES = ("left", "right")
TREES = ("pine", "oak")
SHORE = 0.52  # height of the mirror line, as a fraction from the top
RIDGES = 3
WALLS = ((0.82, 0.20, 0.16), (0.20, 0.36, 0.80), (0.95, 0.78, 0.20), (0.94, 0.94, 0.92))  # one per colour

_SKY_TOP = ((0.25, 0.53, 0.86), (0.30, 0.24, 0.48), (0.03, 0.05, 0.16))
_SKY_LOW = ((0.76, 0.88, 0.97), (0.98, 0.62, 0.38), (0.15, 0.19, 0.38))
_LIGHT = ((1.00, 0.93, 0.45), (1.00, 0.55, 0.25), (0.93, 0.93, 0.85))
_AMBIENT = ((1.0, 1.0, 1.0), (0.82, 0.66, 0.62), (0.34, 0.40, 0.58))
_LAND_LIT = ((0.58, 0.57, 0.64), (0.45, 0.66, 0.33), (0.90, 0.76, 0.48))
_LAND_DARK = ((0.38, 0.38, 0.47), (0.31, 0.52, 0.26), (0.76, 0.59, 0.33))
_CROWN = ((0.08, 0.34, 0.20), (0.36, 0.58, 0.16))
_GRASS, _ROOF, _TRUNK, _DOOR = (0.30, 0.50, 0.22), (0.27, 0.22, 0.24), (0.36, 0.25, 0.16), (0.24, 0.15, 0.10)
_SNOW, _PANE, _LAMP, _WATER = (0.96, 0.97, 1.0), (0.62, 0.80, 0.92), (1.0, 0.85, 0.40), (0.08, 0.20, 0.30)


@dataclass(frozen=True)
class Scenes:
    """Parameters of B scenes; render them at any size.

    Args:
        choices: name -> (B,) int64, indices into the tuples of words above; side is the house's.
        chances: name -> (B,) or (B, RIDGES) numbers from 0 to 1 for everything that no caption names.
    """

    choices: dict[str, Tensor]
    chances: dict[str, Tensor]

    def captions(self) -> list[str]:
        """Return one caption per scene, such as "dusk sun left hills red house right pine left"."""
        rows = zip(*(self.choices[name].tolist() for name in CHOICES), strict=True)
        return [
            f"{TIMES[time]} {'moon' if time == 2 else 'sun'} {PLACES[place]} {LANDS[land]} {COLOURS[colour]} house "
            f"{SIDES[side]} {TREES[tree]} {SIDES[1 - side]}"
            for time, place, land, colour, side, tree in rows
        ]


CHOICES = {"time": TIMES, "place": PLACES, "land": LANDS, "colour": COLOURS, "side": SIDES, "tree": TREES}
CHANCES = {"light_x": 1, "light_y": 1, "peak_x": RIDGES, "peak_height": RIDGES, "peak_width": RIDGES,
           "house_x": 1, "house_size": 1, "tree_x": 1, "tree_size": 1}  # fmt: skip


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Return `count` random scenes; equal generators give equal scenes."""
    choices = {name: torch.randint(len(words), (count,), generator=generator) for name, words in CHOICES.items()}
    chances = {name: torch.rand(count, number, generator=generator).squeeze(-1) for name, number in CHANCES.items()}
    return Scenes(choices, chances)


def scenes_of_captions(captions: list[str], generator: torch.Generator) -> Scenes:
    """Return a scene for each caption, everything it does not name by chance.

    Raises:
        ValueError: a caption is not of the form that `Scenes.captions` writes.
    """
    scenes = draw_scenes(len(captions), generator)
    for row, caption in enumerate(captions):
        words = caption.split()
        if len(words) != 9:
            raise ValueError(f"a caption has nine words, got {caption!r}")
        said = dict(
            zip(("time", "place", "land", "colour", "side", "tree"), words[:1] + words[2:5] + words[6:8], strict=True)
        )
        for name, word in said.items():
            if word not in CHOICES[name]:
                raise ValueError(f"{word!r} is no {name}; known: {', '.join(CHOICES[name])}")
            scenes.choices[name][row] = CHOICES[name].index(word)
        if scenes.captions()[row] != caption:
            raise ValueError(f"the caption contradicts itself; did you mean {scenes.captions()[row]!r}?")
    return scenes


def ambient_light(times: Tensor) -> Tensor:
    """Return (B, 3), what the light of each time of day (an index into TIMES) makes of white."""
    return torch.tensor(_AMBIENT)[times]


def render(scenes: Scenes, size: int) -> Tensor:
    """Return pictures (B, 3, size, size) with values from 0 to 1, antialiased at that size."""
    canvas = _Canvas(scenes, size)
    _paint_sky(canvas)
    _paint_land(canvas)
    _paint_house(canvas)
    _paint_tree(canvas)
    return canvas.mirrored()


class _Canvas:
    """B pictures under work; `fill` lays colour over them where a signed distance is negative."""

    def __init__(self, scenes: Scenes, size: int) -> None:
        self.choices, self.chances, self.pixel = scenes.choices, scenes.chances, 1 / size
        middle = (torch.arange(size) + 0.5) / size
        self.depth = (middle - SHORE).clamp(min=0)[:, None].expand(size, size)  # below the mirror line
        ripple = 0.004 * torch.sin(self.depth.sqrt() * 60) * (self.depth > 0)
        self.x = middle[None, :] + ripple
        self.y = torch.where(self.depth > 0, 2 * SHORE - middle[:, None], middle[:, None])
        self.ambient = self.pick(_AMBIENT, "time")
        self.picture = torch.zeros(len(self.choices["time"]), 3, size, size)

    def pick(self, table: tuple[tuple[float, float, float], ...], name: str) -> Tensor:
        """Return (B, 3, 1, 1), each scene's colour of a table with one row per word of a choice."""
        return torch.tensor(table)[self.choices[name]][:, :, None, None]

    def chance(self, name: str, low: float, high: float, column: int | None = None) -> Tensor:
        """Return (B, 1, 1), each scene's chance spread over low..high."""
        drawn = self.chances[name] if column is None else self.chances[name][:, column]
        return (low + (high - low) * drawn)[:, None, None]

    def fill(self, distance: Tensor, colour: Tensor | tuple[float, float, float], lit: bool = True) -> None:
        """Lay a colour over where `distance` (B, H, W), in picture widths, is negative."""
        cover = (0.5 - distance / self.pixel).clamp(0, 1).unsqueeze(1)
        colour = torch.tensor(colour)[None, :, None, None] if isinstance(colour, tuple) else colour
        self.picture = torch.lerp(
            self.picture, (colour * self.ambient if lit else colour).expand_as(self.picture), cover
        )

    def mirrored(self) -> Tensor:
        """Return the pictures with the lower part turned into water."""
        water = torch.tensor(_WATER)[None, :, None, None] * (0.4 + 0.6 * self.ambient)
        stripes = 0.03 * torch.sin(self.depth.sqrt() * 60)
        lake = torch.lerp(self.picture, water.expand_as(self.picture), 0.28) * (0.95 + stripes)
        share = (self.depth / self.pixel).clamp(0, 1)
        return torch.lerp(self.picture, lake, share).clamp(0, 1)


def _box(canvas: _Canvas, x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    return torch.maximum((canvas.x - x).abs() - half_width, (canvas.y - y).abs() - half_height)


def _triangle(canvas: _Canvas, x: Tensor, base: Tensor, half_width: Tensor, height: Tensor) -> Tensor:
    slope = height / half_width
    side = (base - height + slope * (canvas.x - x).abs() - canvas.y) / (1 + slope**2).sqrt()
    return torch.maximum(side, canvas.y - base)


def _paint_sky(canvas: _Canvas) -> None:
    rise = (canvas.y / SHORE).clamp(0, 1)
    canvas.picture = torch.lerp(canvas.pick(_SKY_TOP, "time"), canvas.pick(_SKY_LOW, "time"), rise)
    x = canvas.chance("light_x", -0.08, 0.08) + 0.2 + 0.3 * canvas.choices["place"][:, None, None]
    y = canvas.chance("light_y", 0.09, 0.17)
    far = ((canvas.x - x) ** 2 + (canvas.y - y) ** 2).sqrt()
    light = canvas.pick(_LIGHT, "time")
    glow = 0.45 * torch.exp(-((far / 0.16) ** 2)).unsqueeze(1)
    canvas.picture = torch.lerp(canvas.picture, light.expand_as(canvas.picture), glow)
    canvas.fill(far - 0.055, light, lit=False)


def _paint_land(canvas: _Canvas) -> None:
    lit, dark = canvas.pick(_LAND_LIT, "land"), canvas.pick(_LAND_DARK, "land")
    rocky = (canvas.choices["land"] == 0)[:, None, None]
    for ridge in range(RIDGES):  # one in each third, from the back to the front
        third = (1, 0, 2)[ridge]
        x = canvas.chance("peak_x", 0.04, 0.30, ridge) + third / 3
        height = canvas.chance("peak_height", 0.15, 0.34, ridge)
        width = canvas.chance("peak_width", 0.22, 0.34, ridge)
        away = (canvas.x - x) / width
        height = torch.where(rocky, height, height * 0.62)
        profile = torch.where(rocky, 1 - away.abs(), torch.exp(-2 * away**2))
        slope = torch.where(rocky, height / width, 1.2 * height / width)
        distance = (SHORE - height * profile - canvas.y) / (1 + slope**2).sqrt()
        shade = torch.where(rocky, (0.5 + (canvas.x - x) / canvas.pixel).clamp(0, 1), torch.full_like(away, ridge / 3))
        canvas.fill(distance, torch.lerp(lit, dark, shade.unsqueeze(1)))
        snow = torch.maximum(distance, canvas.y - (SHORE - 0.68 * height))
        canvas.fill(torch.where(rocky, snow, torch.ones_like(snow)), _SNOW)
    canvas.fill((SHORE - 0.035 - canvas.y).expand(len(height), -1, -1), _GRASS)


def _side(canvas: _Canvas, name: str, other: bool) -> Tensor:
    right = canvas.choices["side"] != int(other)
    return canvas.chance(name, 0.18, 0.34) + 0.48 * right[:, None, None]


def _paint_house(canvas: _Canvas) -> None:
    x, half = _side(canvas, "house_x", other=False), canvas.chance("house_size", 0.085, 0.115)
    ground = torch.full_like(x, SHORE - 0.012)
    wall = half * 0.62
    canvas.fill(_box(canvas, x, ground - wall, half, wall), canvas.pick(WALLS, "colour"))
    canvas.fill(_triangle(canvas, x, ground - 2 * wall, half * 1.2, half * 0.9), _ROOF)
    canvas.fill(_box(canvas, x - half * 0.4, ground - half * 0.38, half * 0.2, half * 0.38), _DOOR)
    pane = torch.lerp(torch.tensor(_LAMP), torch.tensor(_PANE), (canvas.choices["time"] == 0).float()[:, None])
    window = _box(canvas, x + half * 0.38, ground - half * 0.66, half * 0.24, half * 0.24)
    canvas.fill(window, pane[:, :, None, None], lit=False)


def _paint_tree(canvas: _Canvas) -> None:
    x, size = _side(canvas, "tree_x", other=True), canvas.chance("tree_size", 0.20, 0.27)
    ground = torch.full_like(x, SHORE - 0.012)
    pine = (canvas.choices["tree"] == 0)[:, None, None]
    canvas.fill(_box(canvas, x, ground - size * 0.2, size * 0.06, size * 0.2), _TRUNK)
    tiers = [_triangle(canvas, x, ground - size * (0.2 + 0.24 * tier), size * (0.36 - 0.08 * tier), size * 0.36)
             for tier in range(3)]  # fmt: skip
    needles = torch.minimum(torch.minimum(tiers[0], tiers[1]), tiers[2])
    leaves = ((canvas.x - x) ** 2 + (canvas.y - (ground - size * 0.64)) ** 2).sqrt() - size * 0.34
    canvas.fill(torch.where(pine, needles, leaves), canvas.pick(_CROWN, "tree"))
