"""The demo's video latents: a fixed linear transform of small clips into Wan's 16 channels, and back.

A latent cell is 2 x 2 pixels of 4 frames of a small clip, and 8 x 8 pixels of the size that nodes ask for. Of the 48
numbers in a cell it keeps the 16 cosine coefficients that drawn clips need most: lightness and both colour differences
at four speeds, and where in the cell the light lies. As in Wan's own autoencoder the first frame is alone: 4 k + 1
frames are k + 1 latent frames. ComfyUI applies Wan's statistics to what its nodes hand around, so they are undone here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS, CELL, FRAMES = 16, 2, 4
# (colour axis, row frequency, column frequency, time frequency) and the model's units per unit of each
KEPT = (
    *((0, 0, 0, speed) for speed in range(4)),
    *((1, 0, 0, speed) for speed in range(4)),
    *((2, 0, 0, speed) for speed in range(4)),
    (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1),
)  # fmt: skip
UNITS = (1.0, 4.5, 4.5, 4.5, 2.0, 6.0, 6.0, 6.0, 2.0, 6.0, 6.0, 6.0, 3.0, 3.0, 3.0, 4.5)
_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))  # lightness, red to blue, green to purple
# statistics of Wan 2.1's latents, as ComfyUI's latent format Wan21 has them
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
SPREAD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
          3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


def _basis() -> Tensor:
    """Return (16, 3 * FRAMES * CELL * CELL), orthonormal rows."""

    def wave(frequency: int, length: int) -> Tensor:
        row = torch.cos(math.pi * (torch.arange(length) + 0.5) * frequency / length)
        return row / row.norm()

    rows = []
    for axis, row, column, speed in KEPT:
        colour = torch.tensor(_AXES[axis])
        cell = torch.einsum("c,t,y,x->ctyx", colour / colour.norm(), wave(speed, FRAMES), wave(row, CELL),
                            wave(column, CELL))  # fmt: skip
        rows.append(cell.flatten())
    return torch.stack(rows)


def latents_of(clips: Tensor) -> Tensor:
    """Return the model's latents (B, 16, k + 1, H / 2, W / 2) of clips (B, 3, 4 k + 1, H, W) from 0 to 1.

    The first frame counts as four equal ones, so that all latent frames have the same meaning.
    """
    clips = torch.cat((clips[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1), clips), dim=2) - 0.5
    kernel = _basis().to(clips).view(CHANNELS, 3, FRAMES, CELL, CELL)
    latents = F.conv3d(clips, kernel, stride=(FRAMES, CELL, CELL))
    return latents * torch.tensor(UNITS).to(clips).view(-1, 1, 1, 1)


def clips_of(latents: Tensor) -> Tensor:
    """Return clips (B, 3, 4 k + 1, 2 H, 2 W) from 0 to 1 of the model's latents (B, 16, k + 1, H, W)."""
    latents = latents / torch.tensor(UNITS).to(latents).view(-1, 1, 1, 1)
    kernel = _basis().to(latents).view(CHANNELS, 3, FRAMES, CELL, CELL)
    clips = F.conv_transpose3d(latents, kernel, stride=(FRAMES, CELL, CELL))
    first = clips[:, :, :FRAMES].mean(2, keepdim=True)
    return (torch.cat((first, clips[:, :, FRAMES:]), dim=2) + 0.5).clamp(0, 1)


def of_comfyui(latents: Tensor) -> Tensor:
    """Return the model's latents of those that ComfyUI's nodes hand around for Wan 2.1."""
    mean, spread = (torch.tensor(each).to(latents).view(-1, 1, 1, 1) for each in (MEAN, SPREAD))
    return (latents - mean) / spread


def to_comfyui(latents: Tensor) -> Tensor:
    """Return what ComfyUI's nodes hand around, of the model's latents."""
    mean, spread = (torch.tensor(each).to(latents).view(-1, 1, 1, 1) for each in (MEAN, SPREAD))
    return latents * spread + mean
