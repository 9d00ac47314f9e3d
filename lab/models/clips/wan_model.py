"""Wan 2.1's text-to-video transformer in plain PyTorch, for training the demo's video model without ComfyUI.

Names of parameters and numbers are those of the released checkpoints, so that a state dict goes both ways. A test holds
the forward against ComfyUI's own class. It is written by hand: ComfyUI's class changes tensors in place, which training
cannot have, and that of diffusers has other names. Source: Wan-AI/Wan2.1-T2V-1.3B as ComfyUI reads it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import RMSNorm, Rotary, modulated, rotary, rotate


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a model. ComfyUI reads heads from `dim`, because a head always has 128 numbers.

    Args:
        channels: of the latent; one token is `patch` x `patch` latent cells of one latent frame.
        text: numbers per text token. ffn: width inside the feed-forward network.
    """

    channels: int = 16
    patch: int = 2
    text: int = 64
    dim: int = 256
    ffn: int = 576
    blocks: int = 4
    head: int = 128
    wave: int = 256

    @property
    def axes(self) -> tuple[int, int, int]:
        """Rotary dimensions for frame, row and column; they add up to a head."""
        side = 2 * (self.head // 6)
        return self.head - 2 * side, side, side


class _Attention(nn.Module):
    """Attention of one sequence to itself, with rotary places, or to text, without."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = config.head
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim), RMSNorm(config.dim)  # over all heads at once

    def forward(self, x: Tensor, context: Tensor, embedding: Rotary | None = None) -> Tensor:
        """Return (B, N, dim) for tokens x (B, N, dim) that look at context (B, M, dim)."""
        rows = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        query, key, value = (each.unflatten(-1, (-1, self.head)).transpose(1, 2) for each in rows)
        if embedding is not None:
            query, key = rotate(query, embedding), rotate(key, embedding)
        return self.o(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention over the clip, attention to the text, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = _Attention(config), _Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, 1e-6)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn), nn.GELU("tanh"), nn.Linear(config.ffn, config.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, vector: Tensor, text: Tensor, embedding: Rotary) -> Tensor:
        """Return the tokens (B, N, dim); vector is (B, 6, dim), from the noise level."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + vector).chunk(6, dim=1)
        inner = modulated(x, shift, scale)
        x = x + gate * self.self_attn(inner, inner, embedding)
        x = x + self.cross_attn(self.norm3(x), text)
        return x + ffn_gate * self.ffn(modulated(x, ffn_shift, ffn_scale))


class _Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = (self.modulation + vector[:, None]).chunk(2, dim=1)
        return self.head(modulated(x, shift, scale))


class WanModel(nn.Module):
    """Wan's transformer: noisy latent, noise level and text in, velocity (noise minus data) out."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        patch = (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, patch, patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text, config.dim), nn.GELU("tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.wave, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.head = _Head(config)

    def initialise(self, seed: int) -> None:
        """Draw weights of variance 1 / inputs; what opens blocks, and the last layer, is zero, for a calm start."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
                calm = name.startswith(("time_projection", "head.")) or name.endswith("cross_attn.o.weight")
                parameter.data.copy_(torch.zeros_like(drawn) if calm else drawn)
            elif name.endswith("bias"):
                parameter.data.zero_()

    def forward(self, latent: Tensor, level: Tensor, text: Tensor, spacing: float = 1.0) -> Tensor:
        """Return the velocity.

        Args:
            latent: (B, channels, F, H, W), H and W multiples of the patch.
            level: (B,) noise level from 0 to 1; ComfyUI hands its model 1000 times that.
            text: (B, T, text).
            spacing: distance of neighbouring rows and columns in rotary units; above 1 a coarse grid covers the same
                picture. Frames are always 1 apart.
        """
        patch, (frames, height, width) = self.config.patch, latent.shape[-3:]
        grid = frames, height // patch, width // patch
        x = self.patch_embedding(latent).flatten(2).transpose(1, 2)
        vector = self.time_embedding(_wave(1000 * level, self.config.wave))
        gates = self.time_projection(vector).unflatten(1, (6, -1))
        text, embedding = self.text_embedding(text), self.rotary(grid, spacing, latent.device)
        for block in self.blocks:
            x = block(x, gates, text, embedding)
        x = self.head(x, vector).unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, F, h, w, p, q, channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def rotary(self, grid: tuple[int, int, int], spacing: float, device: torch.device) -> Rotary:
        """Return cosine and sine (N, head / 2) of the tokens of a grid (frames, rows, columns)."""
        frames = torch.arange(grid[0], device=device).float()
        rows, columns = ((torch.arange(side, device=device) + 0.5) * spacing - 0.5 for side in grid[1:])
        places = torch.stack(torch.meshgrid(frames, rows, columns, indexing="ij"), -1).flatten(0, 2)
        return rotary(places, self.config.axes)


def _wave(position: Tensor, size: int) -> Tensor:
    half = size // 2
    angle = position.float()[:, None] * 10000 ** (-torch.arange(half, device=position.device) / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
