"""The demo's latent space: colours of a quarter-size picture, folded into FLUX's 16 channels.

Channels 0 to 11 are the colours of four squares of 4 x 4 pixels (a latent cell is 8 x 8 pixels), around 0. Channels 12
and 13 alternate by row and by column; they tell the decoder which half of a doubled cell it is in. 14 and 15 are 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS, COLOURS, PHASES = 16, 12, 2
SPREAD = 3.0  # latent units per unit of colour


def latents_of(small: Tensor) -> Tensor:
    """Return latents (B, 16, H / 2, W / 2) of quarter-size pictures (B, 3, H, W) with values from 0 to 1."""
    colours = SPREAD * (F.pixel_unshuffle(small, 2) - 0.5)
    height, width = colours.shape[-2:]
    rows = (1 - 2 * (torch.arange(height, device=small.device) % 2)).to(small)[:, None].expand(height, width)
    columns = (1 - 2 * (torch.arange(width, device=small.device) % 2)).to(small)[None, :].expand(height, width)
    phases = torch.stack((rows, columns)).expand(len(small), -1, -1, -1)
    return torch.cat((colours, phases, torch.zeros_like(phases)), dim=1)


def small_pictures_of(latents: Tensor) -> Tensor:
    """Return the quarter-size pictures (B, 3, 2 H, 2 W) inside latents (B, 16, H, W), from 0 to 1."""
    return (F.pixel_shuffle(latents[:, :COLOURS], 2) / SPREAD + 0.5).clamp(0, 1)
