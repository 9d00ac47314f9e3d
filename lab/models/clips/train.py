"""Train the demo's video model on clips of a ball and a tower: `python -m lab.models.clips.train`. It resumes.

Stages grow the picture; coarse grids get the rotary places of the fine one, so that a place means the same all through.
Frames are the same in all stages. Guidance is classifier-free, as with Wan: a tenth of the captions is left out.
"""

import argparse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ... import ROOT
from ...demo.nodes.captions import encode_caption
from ...demo.nodes.clip_latents import CELL, latents_of
from ..flow_training import FlowTrainer, train_stages
from .scenes import FRAMES, draw_scenes, render
from .wan_model import WanConfig, WanModel

GRID = (12, 16)  # rows and columns of tokens at which the model is meant to be used: 192 x 256 pixels in ComfyUI
PATCH = 2  # latent cells per side of a token
DROP = 0.1  # share of captions replaced by nothing, for guidance
SHIFT = 8.0  # of the noise levels when sampling; what ComfyUI takes for Wan 2.1


@dataclass(frozen=True)
class Stage:
    """Some steps of training at one size; the learning rate goes from `start` to `end` times its full value.

    Args:
        grid: rows and columns of tokens; a clip has 5 latent frames of them.
        shift, spread: of the noise levels; larger pictures need more of the high ones, where the ball's path is chosen.
        fine: the grid of the last stage, whose rotary places this one gets.
    """

    name: str
    grid: tuple[int, int]
    batch: int
    steps: int
    start: float
    end: float
    shift: float = 6.0
    spread: float = 1.5
    fine: tuple[int, int] = GRID

    @property
    def spacing(self) -> float:
        """Distance of neighbouring tokens in rotary units."""
        return self.fine[0] / self.grid[0]


STAGES = (
    Stage("240 tokens", (6, 8), 16, 1500, 1.0, 0.8, shift=3.0),
    Stage("960 tokens", GRID, 4, 700, 0.8, 0.6),
    Stage("960 tokens, cooling", GRID, 4, 300, 0.6, 0.02),
)
# more pictures and 1,500 tokens, for a GPU; written down, not run
LARGE = (
    Stage("240 tokens", (6, 8), 128, 4000, 1.0, 1.0, shift=3.0, fine=(15, 20)),
    Stage("960 tokens", (12, 16), 64, 4000, 1.0, 0.8, fine=(15, 20)),
    Stage("1500 tokens", (15, 20), 64, 4000, 0.8, 0.6, fine=(15, 20)),
    Stage("1500 tokens, cooling", (15, 20), 64, 3000, 0.6, 0.02, fine=(15, 20)),
)


class Trainer(FlowTrainer):
    """As its base, on clips."""

    def __init__(self, seed: int = 0, device: str = "cpu", config: WanConfig | None = None) -> None:
        super().__init__(lambda: WanModel(config or WanConfig()), 0.996, seed, device)

    def loss(self, stage: Stage, generator: torch.Generator) -> Tensor:
        clean, noise, level, text = (part.to(self.device) for part in draw_batch(stage, generator))
        noisy = torch.lerp(clean, noise, level[:, None, None, None, None])
        with torch.autocast(self.device, torch.bfloat16):
            velocity = self.model(noisy, level, text, stage.spacing)
        return (velocity.float() - (noise - clean)).square().mean()


@lru_cache(256)
def encoded(caption: str) -> Tensor:
    """Return the text tokens of `encode_caption`, remembered."""
    return encode_caption(caption)[0]


def draw_batch(stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return clean latents, noise, noise levels (B,) and text of a step."""
    scenes = draw_scenes(stage.batch, generator)
    side = CELL * PATCH
    clean = latents_of(render(scenes, (side * stage.grid[0], side * stage.grid[1])))
    noise = torch.randn(clean.shape, generator=generator)
    level = torch.sigmoid(stage.spread * torch.randn(stage.batch, generator=generator))
    level = stage.shift * level / (1 + (stage.shift - 1) * level)
    text = torch.stack([encoded(caption) for caption in scenes.captions()])
    keep = (torch.rand(stage.batch, generator=generator) >= DROP).float()
    return clean, noise, level, text * keep[:, None, None]


@torch.no_grad()
def sample(model: WanModel, captions: list[str], seed: int, steps: int = 20, guidance: float = 2.0,
           grid: tuple[int, int] = GRID) -> Tensor:  # fmt: skip
    """Return the model's latents for captions, by Euler steps along its guided velocity."""
    shape = (len(captions), model.config.channels, (FRAMES - 1) // 4 + 1, PATCH * grid[0], PATCH * grid[1])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    text = torch.stack([encoded(caption) for caption in captions])
    text = torch.cat((text, torch.zeros_like(text)))
    levels = torch.linspace(1, 0, steps + 1)
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        told, untold = model(torch.cat((latents, latents)), now.expand(len(text)), text, GRID[0] / grid[0]).chunk(2)
        latents = latents + (then - now) * torch.lerp(untold, told, guidance)
    return latents


def run(folder: Path, device: str, stages: tuple[Stage, ...] = STAGES, config: WanConfig | None = None) -> None:
    """Train to the end of the stages; see `flow_training.train_stages`."""
    train_stages(Trainer(0, device, config), folder, stages)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's video model on clips of a ball and a tower.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".comfyui" / "clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", action="store_true", help="the longer training at 1,500 tokens, meant for a GPU")
    args = parser.parse_args()
    run(args.folder, args.device, LARGE if args.large else STAGES)


if __name__ == "__main__":
    main()
