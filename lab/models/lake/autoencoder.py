"""The demo's autoencoder in the layout of TAESD: built by hand, then its end trained.

Encoder: exact by construction; its residual blocks are zero, so they hand non-negative numbers through, and its strided
convolutions take means and unfold squares into channels. It cannot know a cell's phase, which needs a period of two
cells, and leaves channels 12 and 13 at 0. Decoder: the phases open one of four gates per pixel, which undoes the fold
exactly; two smooth doublings follow. Only what comes after the fold is trained, to draw edges sharper than a smooth
doubling does. Source of the layout: TAESD (madebyollin/taesd) as ComfyUI 0.30.0 reads it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latents import CHANNELS, COLOURS, SPREAD

WIDTH = 64
SCALE, SHIFT = 0.3611, 0.1159  # of ComfyUI's FLUX latents; the file undoes them
SQUEEZED_PHASE = 3 * torch.tanh(torch.tensor(1 / 3)).item()  # a phase of 1 behind the decoder's first layer
OFFSET, CLOSED = 1.5, 6.0  # makes colours positive; what a closed gate takes away
ROW, COLUMN, PRESENT, ANY_PHASE, UNFOLDED = (
    16,
    17,
    18,
    19,
    (20, 21, 22),
)  # channels of the decoder, see _build_unfolding


def _conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    """Three convolutions beside a straight path."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def _halving() -> nn.Conv2d:
    return _conv(WIDTH, WIDTH, stride=2, bias=False)


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) from 0 to 1 to latents (B, 16, H / 8, W / 8) and back."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [[_Block() for _ in range(3)] for _ in range(6)]
        self.taesd_encoder = nn.Sequential(
            _conv(3, WIDTH), _Block(), _halving(), *blocks[0], _halving(), *blocks[1], _halving(), *blocks[2],
            _conv(WIDTH, CHANNELS),
        )  # fmt: skip
        self.taesd_decoder = nn.Sequential(
            _Clamp(), _conv(CHANNELS, WIDTH), nn.ReLU(), *blocks[3],
            nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False), *blocks[4],
            nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False), *blocks[5],
            nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False), _Block(), _conv(WIDTH, 3),
        )  # fmt: skip
        self.build(seed=0)

    def encode(self, pictures: Tensor) -> Tensor:
        """Return latents without phases."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures; values may leave 0 to 1 a little."""
        return self.taesd_decoder(latents)

    @property
    def unfolding(self) -> nn.Sequential:
        """The part of the decoder that is exact by construction."""
        return self.taesd_decoder[:11]

    @property
    def doublings(self) -> nn.Sequential:
        """The part of the decoder that is trained."""
        return self.taesd_decoder[11:]

    def state_for_comfyui(self) -> dict[str, Tensor]:
        """Return the tensors of the file that ComfyUI's VAE loader reads, in float16."""
        state = {name: tensor.half() for name, tensor in self.state_dict().items()}
        return state | {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}

    @torch.no_grad()
    def build(self, seed: int) -> None:
        """Set every weight by hand; layers to be trained start as identities with random first layers."""
        for parameter in self.parameters():
            parameter.zero_()
        _build_encoder(self.taesd_encoder)
        _build_unfolding(self.taesd_decoder)
        _build_doublings(self.taesd_decoder, torch.Generator().manual_seed(seed))


def _build_encoder(layers: nn.Sequential) -> None:
    colours = range(3)
    layers[0].weight[colours, colours, 1, 1] = 1.0
    for index in (2, 6):  # 2 x 2 means
        layers[index].weight[colours, colours, 1:, 1:] = 0.25
    for colour in colours:
        for place in range(4):
            layers[10].weight[4 * colour + place, colour, 1 + place // 2, 1 + place % 2] = 1.0
    layers[14].weight[range(COLOURS), range(COLOURS), 1, 1] = SPREAD
    layers[14].bias[:COLOURS] = -SPREAD / 2


def _build_unfolding(layers: nn.Sequential) -> None:
    """Channels: 0-11 colours, 12-15 phases (row, column; each as + and -), 16-18 gates, 19 any phase, 20-22 unfolded.

    Gates are exactly 0 or 1 except for very noisy phases, so that half precision does no harm. Latents without phases,
    as the encoder gives them, unfold to the mean of the four colours.
    """
    first, doubled = layers[1], layers[7]
    first.weight[range(COLOURS), range(COLOURS), 1, 1] = 1.0
    first.bias[:COLOURS] = OFFSET
    doubled.weight[range(COLOURS), range(COLOURS), 1, 1] = 1.0
    for axis in range(2):
        plus, minus = COLOURS + 2 * axis, COLOURS + 2 * axis + 1
        first.weight[plus, COLOURS + axis, 1, 1], first.weight[minus, COLOURS + axis, 1, 1] = 1.0, -1.0
        # phase here plus phase at the next pixel: +-2 in the first half of a cell, 0 in the second, +-1 at the border
        for row, column in ((1, 1), (2, 1) if axis == 0 else (1, 2)):
            for sign, target in ((1.0, plus), (-1.0, minus)):
                doubled.weight[target, plus, row, column] = sign / (2 * SQUEEZED_PHASE)
                doubled.weight[target, minus, row, column] = -sign / (2 * SQUEEZED_PHASE)
    doubled.weight[ANY_PHASE, COLOURS : COLOURS + 2, 1, 1] = 1 / SQUEEZED_PHASE
    gates = layers[9].conv
    rows, columns = [COLOURS, COLOURS + 1], [COLOURS + 2, COLOURS + 3]
    for gate, inputs, level in ((ROW, rows, 0.55), (COLUMN, columns, 0.55), (PRESENT, [ANY_PHASE], 0.40)):
        hidden = gate - ROW
        gates[0].weight[hidden, inputs, 1, 1] = 1 / 0.15
        gates[0].bias[hidden] = -level / 0.15
        gates[2].weight[hidden, hidden, 1, 1], gates[2].bias[hidden] = -1.0, 1.0  # 1 - min(1, x)
        gates[4].weight[gate, hidden, 1, 1], gates[4].bias[gate] = -1.0, 1.0
    unfold = layers[10].conv
    for index in range(COLOURS):
        place, mean = index % 4, COLOURS + index
        unfold[0].weight[index, index, 1, 1], unfold[0].weight[mean, index, 1, 1] = 1.0, 0.25
        own = ((PRESENT, True), (ROW, place // 2 == 0), (COLUMN, place % 2 == 0))
        for hidden, conditions in ((index, own), (mean, ((PRESENT, False),))):
            for gate, is_open in conditions:
                unfold[0].weight[hidden, gate, 1, 1] = CLOSED if is_open else -CLOSED
                unfold[0].bias[hidden] -= CLOSED if is_open else 0.0
            unfold[2].weight[hidden, hidden, 1, 1] = 1.0
            unfold[4].weight[UNFOLDED[index // 4], hidden, 1, 1] = 1.0


def _build_doublings(layers: nn.Sequential, generator: torch.Generator) -> None:
    smooth = torch.tensor([0.25, 0.5, 0.25])
    for doubling, first in ((12, 13), (17, None)):
        _random_rows(layers[doubling], generator, keep=24)
        layers[doubling].weight[UNFOLDED, :] = 0.0
        layers[doubling].weight[UNFOLDED, UNFOLDED] = smooth[:, None] * smooth[None, :]
        for block in range(first or 18, (first or 18) + (3 if first else 1)):
            _random_rows(layers[block].conv[0], generator)
            _random_rows(layers[block].conv[2], generator)
    layers[19].weight[range(3), UNFOLDED, 1, 1] = 1 / SPREAD
    layers[19].bias[:] = 0.5 - OFFSET / SPREAD


def _random_rows(layer: nn.Conv2d, generator: torch.Generator, keep: int = 0) -> None:
    """Draw the rows from `keep` on so that numbers keep their size."""
    rows = torch.randn(layer.weight[keep:].shape, generator=generator)
    layer.weight[keep:] = rows * (2 / layer.weight[0].numel()) ** 0.5 * 0.5
