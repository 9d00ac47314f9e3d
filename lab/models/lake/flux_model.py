"""FLUX.1's transformer in plain PyTorch, for training the demo's models without ComfyUI.

Names of parameters and numbers are those of the released checkpoints, so that a state dict goes both ways. A test holds
the forward against ComfyUI's own class. It is written by hand: ComfyUI's class changes tensors in place, which training
cannot have, and that of diffusers has other names. Source: black-forest-labs/FLUX.1-dev as ComfyUI reads it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import RMSNorm, Rotary, modulated, rotary, rotate


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a model. ComfyUI reads heads from `hidden`, because a head always has 128 numbers.

    Args:
        channels: of the latent; one token is a square of `patch` x `patch` latent cells.
        context: numbers per text token. pooled: numbers of the pooled text vector.
        double, single: number of blocks of each sort.
        axes: rotary dimensions for index, row and column; they add up to a head.
    """

    channels: int = 16
    patch: int = 2
    context: int = 64
    pooled: int = 64
    hidden: int = 256
    double: int = 1
    single: int = 4
    mlp_ratio: int = 4
    axes: tuple[int, int, int] = (16, 56, 56)
    head: int = 128


class _HeadNorms(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(size), RMSNorm(size)


class _Modulation(nn.Module):
    """Shift, scale and gate from the conditioning vector, `triples` times."""

    def __init__(self, hidden: int, triples: int) -> None:
        super().__init__()
        self.triples = triples
        self.lin = nn.Linear(hidden, 3 * triples * hidden)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(3 * self.triples, dim=-1)


class _Attention(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.norm = _HeadNorms(config.head)
        self.proj = nn.Linear(config.hidden, config.hidden)


class _Embedder(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def _heads(qkv: Tensor, norm: _HeadNorms, head: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unflatten(-1, (3, -1, head)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(query), norm.key_norm(key), value


def _attend(query: Tensor, key: Tensor, value: Tensor, embedding: Rotary) -> Tensor:
    result = F.scaled_dot_product_attention(rotate(query, embedding), rotate(key, embedding), value)
    return result.transpose(1, 2).flatten(2)


def _mlp(hidden: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, inner), nn.GELU("tanh"), nn.Linear(inner, hidden))


class DoubleBlock(nn.Module):
    """One attention over text and picture, each with projections of its own."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.head = config.head
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", _Modulation(config.hidden, 2))
            self.add_module(f"{stream}_attn", _Attention(config))
            self.add_module(f"{stream}_mlp", _mlp(config.hidden, config.mlp_ratio * config.hidden))

    def forward(self, text: Tensor, image: Tensor, vector: Tensor, embedding: Rotary):
        """Return text and image, (B, T, hidden) and (B, N, hidden)."""
        text_mod, image_mod = self.txt_mod(vector), self.img_mod(vector)
        parts = [
            _heads(attention.qkv(modulated(x, *mod[:2])), attention.norm, self.head)
            for x, mod, attention in ((text, text_mod, self.txt_attn), (image, image_mod, self.img_attn))
        ]
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        attended = _attend(query, key, value, embedding).split((text.shape[1], image.shape[1]), dim=1)
        text = text + text_mod[2] * self.txt_attn.proj(attended[0])
        text = text + text_mod[5] * self.txt_mlp(modulated(text, *text_mod[3:5]))
        image = image + image_mod[2] * self.img_attn.proj(attended[1])
        return text, image + image_mod[5] * self.img_mlp(modulated(image, *image_mod[3:5]))


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, over one sequence of text and picture."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.head, self.hidden, inner = config.head, config.hidden, config.mlp_ratio * config.hidden
        self.modulation = _Modulation(config.hidden, 1)
        self.linear1 = nn.Linear(config.hidden, 3 * config.hidden + inner)
        self.linear2 = nn.Linear(config.hidden + inner, config.hidden)
        self.norm = _HeadNorms(config.head)

    def forward(self, x: Tensor, vector: Tensor, embedding: Rotary) -> Tensor:
        """Return the sequence (B, T + N, hidden)."""
        shift, scale, gate = self.modulation(vector)
        projected = self.linear1(modulated(x, shift, scale))
        query, key, value = _heads(projected[..., : 3 * self.hidden], self.norm, self.head)
        inner = F.gelu(projected[..., 3 * self.hidden :], approximate="tanh")
        return x + gate * self.linear2(torch.cat((_attend(query, key, value, embedding), inner), dim=-1))


class _FinalLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class FluxModel(nn.Module):
    """FLUX.1's transformer: noisy latent, time and text in, velocity (noise minus data) out."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.patch**2 * config.channels, config.hidden)
        self.txt_in = nn.Linear(config.context, config.hidden)
        self.time_in, self.guidance_in = _Embedder(256, config.hidden), _Embedder(256, config.hidden)
        self.vector_in = _Embedder(config.pooled, config.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single))
        self.final_layer = _FinalLayer(config)

    def initialise(self, seed: int) -> None:
        """Draw weights of variance 1 / inputs; zero modulations and the last layer, so that training starts calm."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
                calm = "mod" in name or name.startswith("final_layer")
                parameter.data.copy_(torch.zeros_like(drawn) if calm else drawn)
            elif name.endswith("bias"):
                parameter.data.zero_()

    def forward(self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor,
                spacing: float = 1.0) -> Tensor:  # fmt: skip
        """Return the velocity.

        Args:
            latent: (B, channels, H, W), H and W multiples of the patch.
            time: (B,) noise level from 0 to 1. guidance: (B,) the embedded guidance.
            text: (B, T, context). pooled: (B, pooled).
            spacing: distance of neighbouring tokens in rotary units; above 1 a coarse grid covers the same picture.
        """
        patch, (height, width) = self.config.patch, (side // self.config.patch for side in latent.shape[-2:])
        image = F.pixel_unshuffle(latent, patch).flatten(2).transpose(1, 2)
        image, text = self.img_in(image), self.txt_in(text)
        vector = self.time_in(_wave(time)) + self.guidance_in(_wave(guidance)) + self.vector_in(pooled)
        embedding = self.rotary(text.shape[1], height, width, spacing, latent.device)
        for block in self.double_blocks:
            text, image = block(text, image, vector, embedding)
        sequence = torch.cat((text, image), dim=1)
        for block in self.single_blocks:
            sequence = block(sequence, vector, embedding)
        result = self.final_layer(sequence[:, text.shape[1] :], vector)
        return F.pixel_shuffle(result.transpose(1, 2).unflatten(2, (height, width)), patch)

    def rotary(self, num_text: int, height: int, width: int, spacing: float, device) -> Rotary:
        """Return cosine and sine (T + N, head / 2); text lies at the origin, as in FLUX."""
        rows = (torch.arange(height, device=device) + 0.5) * spacing - 0.5
        columns = (torch.arange(width, device=device) + 0.5) * spacing - 0.5
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        places = F.pad(F.pad(grid, (1, 0)), (0, 0, num_text, 0))
        return rotary(places, self.config.axes)


def _wave(level: Tensor) -> Tensor:
    frequency = torch.exp(-torch.arange(128, device=level.device) * (9.210340371976184 / 128))  # ln 10000
    angle = 1000 * level[:, None].float() * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
