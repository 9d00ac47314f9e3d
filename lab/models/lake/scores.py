"""Scores of a picture of a lake: does the water mirror the land, does the house match the caption.

Both are read from pixels, of drawn and of sampled pictures alike, so a drawn scene shows the best that is possible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import COLOURS, SHORE, TIMES, WALLS, ambient_light


def reflection(pictures: Tensor) -> Tensor:
    """Return (B,) the correlation, from -1 to 1, of each lake with the land mirrored into it.

    Args:
        pictures: (B, 3, H, W). What all columns of a row share is taken away first, so that sky and water, which every
            scene has, count for nothing.
    """
    return _correlation(_land(pictures), _lake(pictures))


def reflection_of_others(pictures: Tensor) -> Tensor:
    """Return (B,) the correlation of each lake with the land of the next picture: what chance and captions give."""
    return _correlation(_land(pictures).roll(1, dims=0), _lake(pictures))


def house_of(pictures: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) indices into COLOURS and (B,) 0 for left, 1 for right: the house that is most likely there.

    Args:
        pictures: (B, 3, H, W) from 0 to 1. times: (B,) indices into TIMES, for the light.
    """
    height, width = pictures.shape[-2:]
    rows = slice(round((SHORE - 0.15) * height), round((SHORE - 0.02) * height))
    walls = torch.tensor(WALLS)[None] * ambient_light(times)[:, None]  # (B, colours, 3)
    votes = []
    for left in (0.10, 0.58):
        region = pictures[:, :, rows, round(left * width) : round((left + 0.32) * width)].flatten(2)
        distance = (region[:, None] - walls[..., None]).square().sum(2)  # (B, colours, pixels)
        votes.append((distance < 0.01).sum(-1))
    counts = torch.stack(votes, dim=1)  # (B, sides, colours)
    best = counts.flatten(1).argmax(1)
    return best % len(COLOURS), best // len(COLOURS)


def times_of(captions: list[str]) -> Tensor:
    """Return (B,) the index into TIMES of each caption's first word."""
    return torch.tensor([TIMES.index(caption.split()[0]) for caption in captions])


def _land(pictures: Tensor) -> Tensor:
    shore = round(SHORE * pictures.shape[-2])
    return pictures[:, :, 2 * shore - pictures.shape[-2] : shore].flip(-2)


def _lake(pictures: Tensor) -> Tensor:
    return pictures[:, :, round(SHORE * pictures.shape[-2]) :]


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    parts = [F.avg_pool2d(part, 4) for part in (first, second)]  # ripples are finer than this
    parts = [(part - part.mean(-1, keepdim=True)).flatten(1) for part in parts]
    return F.cosine_similarity(*parts, dim=1)
