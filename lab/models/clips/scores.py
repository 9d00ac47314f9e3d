"""Scores of a clip of a ball and a tower: mirror in the water, ball before and behind the tower, path.

All is read from pixels, of drawn and of sampled clips alike, so drawn clips show the best that is possible. What chance
and captions alone give is measured by pairing parts of different clips.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import BALLS, FRAMES, SHORE

BEFORE, AFTER = slice(0, 6), slice(FRAMES - 6, FRAMES)  # frames in which the ball is in sight, wholly or in part
SEEN = 0.0015  # share of the sky's pixels that a ball has to cover in a frame, an eighth of what it does cover
FEW = 3  # frames of a part in which it has to be seen


@dataclass(frozen=True)
class Track:
    """Where a ball of each colour is.

    Args:
        mass: (B, colours, FRAMES), share of the sky that it covers. x, y: the same shape, its middle in picture widths.
    """

    mass: Tensor
    x: Tensor
    y: Tensor

    def colour(self, part: slice) -> Tensor:
        """Return (B,) indices into COLOURS, the ball that is seen most in a part of the clip; -1 where none is."""
        mass = self.mass[:, :, part]
        best = mass.sum(2).argmax(1)
        return torch.where((self._of(self.mass, best)[:, part] > SEEN).sum(1) >= FEW, best, -1)

    def way(self, part: slice) -> Tensor:
        """Return (B,) 0 where that ball moves right, 1 where it moves left, -1 where none is seen."""
        colour = self.colour(part)
        mass, x = (self._of(each, colour.clamp(min=0))[:, part] for each in (self.mass, self.x))
        weight = (mass > SEEN).float()
        time = torch.arange(mass.shape[1]).float()
        time = time - (weight * time).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return torch.where(colour < 0, -1, ((weight * time * x).sum(1) < 0).long())

    def bend(self, following: "Track | None" = None) -> Tensor:
        """Return (B,) the root mean square distance, in picture widths, of the ball's path from a straight line.

        Args:
            following: whose ball is meant after the tower; None is this track's own.

        Notes:
            Only frames in which it is wholly in sight. NaN where there are fewer than two before, or after, the tower.
        """
        parts = [self._whole(BEFORE), (following or self)._whole(AFTER)]
        weight, time, x, y = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        residual = sum((each - _line(time, each, weight, time)).square() for each in (x, y))
        bend = ((weight * residual).sum(1) / weight.sum(1).clamp(min=1)).sqrt()
        return torch.where(_enough(parts), bend, torch.nan)

    def miss(self, following: "Track | None" = None) -> Tensor:
        """Return (B,) how far, in picture widths, the ball comes out of the tower from where its path in leads.

        The root mean square distance over the frames after the tower; arguments and NaN as in `bend`.
        """
        parts = [self._whole(BEFORE), (following or self)._whole(AFTER)]
        (seen, when, *path), (weight, time, *onward) = parts
        away = sum((b - _line(when, a, seen, time)).square() for a, b in zip(path, onward, strict=True))
        return torch.where(_enough(parts), ((weight * away).sum(1) / weight.sum(1).clamp(min=1)).sqrt(), torch.nan)

    def _whole(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weight, time, x and y, each (B, frames of the part)."""
        colour = self.mass.sum(2).argmax(1)
        mass, x, y = (self._of(each, colour) for each in (self.mass, self.x, self.y))
        near = 0.085  # a ball cut by the picture's edge has its middle elsewhere
        weight = (mass > 0.88 * mass.amax(1, keepdim=True)) & (mass > SEEN) & (x > near) & (x < 1 - near)
        time = torch.arange(FRAMES).float().expand_as(x)
        return weight[:, part].float(), time[:, part], x[:, part], y[:, part]

    def rolled(self) -> "Track":
        """Return the tracks of the next clips."""
        return Track(*(each.roll(1, dims=0) for each in (self.mass, self.x, self.y)))

    @staticmethod
    def _of(values: Tensor, colour: Tensor) -> Tensor:
        return values[torch.arange(len(values)), colour]


def track(clips: Tensor) -> Track:
    """Find what moves in the sky of clips (B, 3, FRAMES, H, W) and has a ball's colour."""
    height, width = clips.shape[-2:]
    sky = clips[..., : round(SHORE * height), :]
    moved = (sky - _still(sky)).square().sum(1) > 0.03
    balls = torch.tensor(BALLS)[None, :, :, None, None, None]
    away = (sky[:, None] - balls).square().sum(2)  # (B, colours, FRAMES, rows, columns)
    nearest = away == away.amin(1, keepdim=True)
    weight = torch.exp(-away / 0.08) * nearest * moved[:, None]
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(sky.shape[-2]) + 0.5) / width
    total = weight.sum((3, 4)).clamp(min=1e-6)
    place = ((weight * x).sum((3, 4)) / total, (weight * y[:, None]).sum((3, 4)) / total)
    return Track(weight.mean((3, 4)), *place)


def reflection(clips: Tensor, moving: bool) -> Tensor:
    """Return (B,) the correlation, from -1 to 1, of each clip's water with the sky and land mirrored into it.

    Args:
        clips: (B, 3, FRAMES, H, W).
        moving: of what moves, or else of what stands still; there what all columns of a row share counts for nothing.
    """
    return _correlation(_land(clips), _lake(clips), moving)


def reflection_of_others(clips: Tensor, moving: bool) -> Tensor:
    """Return (B,) the correlation of each clip's water with the land of the next clip: what chance gives."""
    return _correlation(_land(clips).roll(1, dims=0), _lake(clips), moving)


def judge(clips: Tensor, choices: dict[str, Tensor]) -> dict[str, float]:
    """Return all scores of clips, given what their captions name.

    Notes:
        The ball's are the share of clips in which it has colour and direction of the caption. The path's are medians,
        in percent of the picture's width.
    """
    found = track(clips)
    scores = {f"mirror, {name}": reflection(clips, name == "moving").mean().item() for name in ("still", "moving")}
    scores |= _as_said(found, choices)
    scores["path off a line, %"] = 100 * found.bend().nanmedian().item()
    scores["comes out off its path, %"] = 100 * found.miss().nanmedian().item()
    return scores


def judge_chance(clips: Tensor, choices: dict[str, Tensor]) -> dict[str, float]:
    """Return the scores of wrong pairs: water, caption and second half of the next clip.

    Notes:
        For the path the next clip is one with the same direction, so that only what no caption names can give it away.
    """
    found = track(clips)
    scores = {
        f"mirror, {name}": reflection_of_others(clips, name == "moving").mean().item() for name in ("still", "moving")
    }
    scores |= _as_said(found, {name: each.roll(1) for name, each in choices.items()})
    alike = [Track(*(each[choices["way"] == way] for each in (found.mass, found.x, found.y))) for way in (0, 1)]
    scores["path off a line, %"] = 100 * torch.cat([one.bend(one.rolled()) for one in alike]).nanmedian().item()
    scores["comes out off its path, %"] = 100 * torch.cat([one.miss(one.rolled()) for one in alike]).nanmedian().item()
    return scores


def _as_said(found: Track, choices: dict[str, Tensor]) -> dict[str, float]:
    shares = {}
    for name, part in (("before", BEFORE), ("after", AFTER)):
        right = (found.colour(part) == choices["colour"]) & (found.way(part) == choices["way"])
        shares[f"ball {name} the tower"] = right.float().mean().item()
    return shares


def _enough(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    return torch.stack([weight.sum(1) >= 2 for weight, *_ in parts]).all(0)


def _line(time: Tensor, value: Tensor, weight: Tensor, times: Tensor) -> Tensor:
    """Return, at `times`, the line that fits best (least squares)."""
    total = weight.sum(1, keepdim=True).clamp(min=1)
    middle, mean = ((weight * each).sum(1, keepdim=True) / total for each in (time, value))
    spread = (weight * (time - middle) ** 2).sum(1, keepdim=True).clamp(min=1e-6)
    slope = (weight * (time - middle) * (value - mean)).sum(1, keepdim=True) / spread
    return mean + slope * (times - middle)


def _still(clips: Tensor) -> Tensor:
    # a copy, because torch 2.13 takes wrong medians of a tensor that `expand` made
    return clips.contiguous().median(2, keepdim=True).values


def _land(clips: Tensor) -> Tensor:
    land = clips[..., : round(SHORE * clips.shape[-2]), :]
    return land.unflatten(-2, (-1, 2)).mean(-2).flip(-2)


def _lake(clips: Tensor) -> Tensor:
    return clips[..., round(SHORE * clips.shape[-2]) :, :]


def _correlation(first: Tensor, second: Tensor, moving: bool) -> Tensor:
    parts = []
    for part in (first, second):
        still = _still(part)
        part = part - still if moving else still - still.mean(-1, keepdim=True)
        parts.append(part.flatten(1))
    return F.cosine_similarity(*parts, dim=1)
