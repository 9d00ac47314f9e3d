"""What the demo's two transformers share.

They are written by hand and not ComfyUI's own classes, which change tensors in place that a backward pass needs, so
that their training is plain PyTorch and can be repeated without ComfyUI.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # cosine and sine, (N, head / 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, with the parameter name that ComfyUI saves."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), 1e-6).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the layer norm of x, scaled and shifted by what the noise level gives."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


def rotary(places: Tensor, axes: Sequence[int]) -> Rotary:
    """Return the rotary embedding of tokens.

    Args:
        places: (N, axes), the coordinates of each token.
        axes: dimensions of a head for each coordinate.
    """
    angles = []
    for axis, size in enumerate(axes):
        frequency = 10000 ** (-torch.arange(0, size, 2, device=places.device) / size)
        angles.append(places[:, axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, embedding: Rotary) -> Tensor:
    """Return queries or keys (B, H, N, head) turned by their tokens' rotary embedding."""
    cos, sin = embedding
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
