"""Clips of a ball that flies behind a tower, drawn by code: the training data of the demo's video model.

A scene is sky and hills, a tower on the shore, a ball that crosses the sky at constant speed, and water in the lower
third that mirrors all of it. The ball passes behind the tower in the middle of the clip, so its colour, height and
slope have to be carried over the frames in which nobody sees it; the mirror has to be looked up across the picture.
A caption of six words names time, colour, direction and tower. Its path, hills and sizes are chance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TIMES = ("day", "dusk", "night")
COLOURS = ("red", "green", "yellow", "violet")
WAYS = ("right", "left")  # where the ball flies to
TOWERS = ("white", "brown")
FRAMES = 17
SHAPE = (48, 64)  # rows and columns of the small clips, two pixels per latent cell
SHORE = 2 / 3  # height of the mirror line, as a fraction from the top; the water shows what is above at half height
HILLS = 3
BALLS = ((0.90, 0.12, 0.10), (0.08, 0.62, 0.16), (1.00, 0.86, 0.10), (0.58, 0.14, 0.78))  # one per colour

_SKY_TOP = ((0.25, 0.53, 0.86), (0.30, 0.24, 0.48), (0.03, 0.05, 0.16))
_SKY_LOW = ((0.72, 0.86, 0.97), (0.95, 0.66, 0.50), (0.15, 0.19, 0.38))
_AMBIENT = ((1.0, 1.0, 1.0), (0.82, 0.66, 0.62), (0.34, 0.40, 0.58))
_TOWER = ((0.93, 0.92, 0.88), (0.55, 0.38, 0.26))
_ROOF, _DOOR, _SHORE_LAND, _WATER = (0.30, 0.22, 0.26), (0.22, 0.16, 0.14), (0.42, 0.46, 0.34), (0.08, 0.20, 0.30)
_HILL_NEAR, _HILL_FAR = (0.36, 0.50, 0.40), (0.50, 0.60, 0.62)


@dataclass(frozen=True)
class Scenes:
    """Parameters of B scenes; render them at any size.

    Args:
        choices: name -> (B,) int64, indices into the tuples of words above.
        chances: name -> (B,) or (B, HILLS) numbers from 0 to 1 for everything that no caption names.
    """

    choices: dict[str, Tensor]
    chances: dict[str, Tensor]

    def captions(self) -> list[str]:
        """Return one caption per scene, such as "dusk red ball right white tower"."""
        rows = zip(*(self.choices[name].tolist() for name in CHOICES), strict=True)
        return [f"{TIMES[time]} {COLOURS[colour]} ball {WAYS[way]} {TOWERS[tower]} tower"
                for time, colour, way, tower in rows]  # fmt: skip

    def spread(self, name: str, low: float, high: float) -> Tensor:
        """Return the chance of that name spread over low..high."""
        return low + (high - low) * self.chances[name]

    def path(self) -> tuple[Tensor, Tensor]:
        """Return x and y (B, FRAMES) of the ball's middle in picture widths and heights: a straight line."""
        sign = 1.0 - 2.0 * self.choices["way"]
        time = torch.arange(FRAMES) - (FRAMES - 1) / 2
        speed = sign * self.spread("speed", 0.046, 0.050)
        x = 0.5 + self.spread("lead", -0.012, 0.012)[:, None] + speed[:, None] * time
        y = self.spread("height", 0.20, 0.38)[:, None] + self.spread("slope", -0.010, 0.010)[:, None] * time
        return x, y


CHOICES = {"time": TIMES, "colour": COLOURS, "way": WAYS, "tower": TOWERS}
CHANCES = {"speed": 1, "lead": 1, "height": 1, "slope": 1, "ball": 1, "tower_x": 1, "tower_width": 1, "tower_top": 1,
           "hill_x": HILLS, "hill_height": HILLS, "hill_width": HILLS}  # fmt: skip


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Return `count` random scenes; equal generators give equal scenes."""
    choices = {name: torch.randint(len(words), (count,), generator=generator) for name, words in CHOICES.items()}
    chances = {name: torch.rand(count, number, generator=generator).squeeze(-1) for name, number in CHANCES.items()}
    return Scenes(choices, chances)


def choices_of(captions: list[str]) -> dict[str, Tensor]:
    """Return what captions name, as in `Scenes.choices`.

    Raises:
        ValueError: a caption is not of the form that `Scenes.captions` writes.
    """
    rows = []
    for caption in captions:
        words = caption.split()
        if len(words) != 6 or words[2] != "ball" or words[5] != "tower":
            raise ValueError(f"a caption is like 'dusk red ball right white tower', got {caption!r}")
        said = dict(zip(CHOICES, (words[0], words[1], words[3], words[4]), strict=True))
        for name, word in said.items():
            if word not in CHOICES[name]:
                raise ValueError(f"{word!r} is no {name}; known: {', '.join(CHOICES[name])}")
        rows.append([CHOICES[name].index(word) for name, word in said.items()])
    return dict(zip(CHOICES, torch.tensor(rows).unbind(1), strict=True))


def scenes_of_captions(captions: list[str], generator: torch.Generator) -> Scenes:
    """Return a scene for each caption, everything it does not name by chance."""
    return Scenes(choices_of(captions), draw_scenes(len(captions), generator).chances)


def render(scenes: Scenes, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Return clips (B, 3, FRAMES, H, W) with values from 0 to 1, antialiased at that size; W / H is 4 / 3."""
    height, width = shape
    canvas = _Canvas(scenes, height, width)
    _paint_backdrop(canvas)
    still = canvas.picture
    x, y = scenes.path()
    radius = scenes.spread("ball", 0.066, 0.074).repeat_interleave(FRAMES)[:, None, None]
    far = ((canvas.x - x.flatten()[:, None, None]) ** 2 + (canvas.y - y.flatten()[:, None, None] * 0.75) ** 2).sqrt()
    canvas.picture = still.repeat_interleave(FRAMES, dim=0)
    ball = torch.tensor(BALLS)[scenes.choices["colour"]].repeat_interleave(FRAMES, dim=0)[:, :, None, None]
    canvas.fill(far - radius, ball)
    outline, paint = _tower(canvas)
    moving = canvas.picture.unflatten(0, (-1, FRAMES))
    moving = torch.lerp(moving, paint[:, None], outline[:, None])  # whatever flies is behind the tower
    canvas.picture = moving.flatten(0, 1)
    return canvas.mirrored(FRAMES).unflatten(0, (-1, FRAMES)).transpose(1, 2)


class _Canvas:
    """Pictures under work, in widths; `fill` lays colour over them where a signed distance is negative."""

    def __init__(self, scenes: Scenes, height: int, width: int) -> None:
        self.scenes, self.pixel = scenes, 1 / width
        shore = round(SHORE * height)
        above, below = torch.arange(shore) + 0.5, 2 * (torch.arange(height - shore) + 0.5)
        rows = torch.cat((above, shore - below))  # the water shows the row twice as far above the shore
        self.x, self.y = ((torch.arange(width) + 0.5) / width)[None, :], (rows / width)[:, None]
        self.soft = torch.ones(height, 1)
        self.soft[shore:] = 1.5  # two rows fall on one
        self.water = (torch.arange(height) >= shore).float()[:, None]
        self.ambient = torch.tensor(_AMBIENT)[scenes.choices["time"]][:, :, None, None]
        self.picture = torch.zeros(0)

    def cover(self, distance: Tensor) -> Tensor:
        """Return (B, 1, H, W), how much of each pixel lies where `distance` is negative."""
        return (0.5 - distance / (self.pixel * self.soft)).clamp(0, 1).unsqueeze(1)

    def fill(self, distance: Tensor, colour: Tensor) -> None:
        """Lay a colour (B, 3, 1, 1) over where `distance` (B, H, W) is negative."""
        self.picture = torch.lerp(self.picture, colour.expand_as(self.picture), self.cover(distance))

    def lit(self, colour: tuple[float, float, float]) -> Tensor:
        """Return (B, 3, 1, 1), a colour in each scene's light."""
        return torch.tensor(colour)[None, :, None, None] * self.ambient

    def mirrored(self, frames: int) -> Tensor:
        """Return the pictures with the lower third turned into water."""
        water = self.lit(_WATER).repeat_interleave(frames, dim=0)
        return torch.lerp(self.picture, torch.lerp(self.picture, water, 0.25), self.water).clamp(0, 1)


def _paint_backdrop(canvas: _Canvas) -> None:
    scenes, ground = canvas.scenes, SHORE * 0.75
    rise = (canvas.y / ground).clamp(0, 1)
    top, low = (torch.tensor(each)[scenes.choices["time"]][:, :, None, None] for each in (_SKY_TOP, _SKY_LOW))
    canvas.picture = torch.lerp(top, low, rise).expand(-1, -1, -1, canvas.x.shape[1])
    for hill in range(HILLS):
        x = (scenes.spread("hill_x", 0.05, 0.28)[:, hill] + (1, 0, 2)[hill] / 3)[:, None, None]
        high = scenes.spread("hill_height", 0.06, 0.15)[:, hill, None, None]
        wide = scenes.spread("hill_width", 0.14, 0.30)[:, hill, None, None]
        distance = ground - high * torch.exp(-2 * ((canvas.x - x) / wide) ** 2) - canvas.y
        canvas.fill(distance, torch.lerp(canvas.lit(_HILL_FAR), canvas.lit(_HILL_NEAR), hill / 2))
    canvas.fill((ground - 0.02 - canvas.y).expand(len(top), -1, canvas.x.shape[1]), canvas.lit(_SHORE_LAND))


def _tower(canvas: _Canvas) -> tuple[Tensor, Tensor]:
    """Return the tower's cover (B, 1, H, W) and its colours (B, 3, H, W)."""
    scenes, ground = canvas.scenes, SHORE * 0.75
    x = scenes.spread("tower_x", 0.49, 0.51)[:, None, None]
    half = scenes.spread("tower_width", 0.145, 0.16)[:, None, None]
    top = scenes.spread("tower_top", 0.03, 0.07)[:, None, None]
    wall = torch.maximum((canvas.x - x).abs() - half, (top - canvas.y))
    outline = canvas.cover(torch.maximum(wall, canvas.y - ground + 0.008))
    walls = torch.tensor(_TOWER)[scenes.choices["tower"]][:, :, None, None] * canvas.ambient
    kept, canvas.picture = canvas.picture, walls.expand(-1, -1, canvas.y.shape[0], canvas.x.shape[1])
    canvas.fill(canvas.y - top - 0.05 + 0 * canvas.x, canvas.lit(_ROOF))
    canvas.fill(torch.maximum((canvas.x - x).abs() - half * 0.3, ground - 0.12 - canvas.y), canvas.lit(_DOOR))
    paint, canvas.picture = canvas.picture, kept
    return outline, paint
