"""Train the demo's FLUX on pictures of lakes: `python -m lab.models.lake.train`. Saves every 100 steps, and resumes.

Stages grow the picture; coarse grids get the rotary places of the fine one, so that a place means the same all through.
The last stage distils guidance into the model, as FLUX.1-dev had it done: one forward then does the work of two.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import ROOT
from ...demo.nodes.captions import encode_caption
from ..flow_training import FlowTrainer, train_stages
from .flux_model import FluxConfig, FluxModel
from .latents import COLOURS, latents_of
from .scenes import draw_scenes, render

GRID = 32  # tokens a side at which the model is meant to be used: 512 pixels
DROP = 0.1  # share of captions replaced by nothing, for guidance
GUIDANCE = (1.0, 4.0)  # strengths that the last stage teaches
SHIFTS = {8: 1.5, 16: 2.2, 32: 3.0}  # tokens a side -> shift of the noise levels


@dataclass(frozen=True)
class Stage:
    """Some steps of training at one size; the learning rate goes from `start` to `end` times its full value."""

    name: str
    tokens: int
    batch: int
    steps: int
    start: float
    end: float
    distil: bool = False


STAGES = (
    Stage("8 x 8 tokens", 8, 64, 400, 1.0, 1.0),
    Stage("16 x 16 tokens", 16, 16, 2000, 1.0, 0.8),
    Stage("32 x 32 tokens", 32, 8, 700, 0.8, 0.6),
    Stage("32 x 32 tokens, cooling", 32, 8, 370, 0.6, 0.04),
    Stage("guidance", 32, 8, 100, 0.15, 0.02, distil=True),
)


class Trainer(FlowTrainer):
    """As its base; once distillation begins it keeps the averaged model as it was then."""

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        super().__init__(lambda: FluxModel(FluxConfig()), 0.998, seed, device)
        self.teacher: FluxModel | None = None

    def loss(self, stage: Stage, generator: torch.Generator) -> Tensor:
        batch = [part.to(self.device) for part in draw_batch(stage, generator)]
        if stage.distil and self.teacher is None:
            self.teacher = copy.deepcopy(self.average)
        with torch.autocast(self.device, torch.bfloat16):
            return distillation_loss(self, stage, *batch) if stage.distil else flow_loss(self, stage, *batch)

    def networks(self) -> dict[str, nn.Module]:
        return super().networks() | ({"teacher": self.teacher} if self.teacher else {})

    def restore(self, states: Mapping[str, dict[str, Tensor]]) -> None:
        if "teacher" in states:
            self.teacher = copy.deepcopy(self.average)
        super().restore(states)


@lru_cache(4096)
def encoded(caption: str) -> tuple[Tensor, Tensor]:
    """Return `encode_caption`, remembered."""
    return encode_caption(caption)


def draw_batch(stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return clean latents, noise, noise levels (B,), text, pooled text and guidance (B,) of a step."""
    scenes = draw_scenes(stage.batch, generator)
    clean = latents_of(render(scenes, 4 * stage.tokens))
    noise = torch.randn(clean.shape, generator=generator)
    level = torch.sigmoid(torch.randn(stage.batch, generator=generator))
    shift = SHIFTS[stage.tokens]
    level = shift * level / (1 + (shift - 1) * level)
    text, pooled = (torch.stack(part) for part in zip(*map(encoded, scenes.captions()), strict=True))
    if not stage.distil:
        keep = (torch.rand(stage.batch, generator=generator) >= DROP).float()
        text, pooled = text * keep[:, None, None], pooled * keep[:, None]
    low, high = GUIDANCE
    return clean, noise, level, text, pooled, low + (high - low) * torch.rand(stage.batch, generator=generator)


def flow_loss(trainer: Trainer, stage: Stage, clean: Tensor, noise: Tensor, level: Tensor, text: Tensor,
              pooled: Tensor, guidance: Tensor) -> Tensor:  # fmt: skip
    """Return the squared error of the velocity (rectified flow). The channels that are always alike count a quarter."""
    noisy = torch.lerp(clean, noise, level[:, None, None, None])
    velocity = trainer.model(noisy, level, text, pooled, guidance, GRID / stage.tokens)
    error = (velocity.float() - (noise - clean)).square().mean((0, 2, 3))
    return (error[:COLOURS].sum() + 0.25 * error[COLOURS:].sum()) / len(error)


def distillation_loss(trainer: Trainer, stage: Stage, clean: Tensor, noise: Tensor, level: Tensor, text: Tensor,
                      pooled: Tensor, guidance: Tensor) -> Tensor:  # fmt: skip
    """Return the squared distance to what classifier-free guidance makes of the averaged model."""
    noisy, spacing = torch.lerp(clean, noise, level[:, None, None, None]), GRID / stage.tokens
    teacher = trainer.teacher
    assert teacher is not None
    with torch.no_grad():
        told = teacher(noisy, level, text, pooled, guidance, spacing).float()
        untold = teacher(noisy, level, torch.zeros_like(text), torch.zeros_like(pooled), guidance, spacing).float()
        target = torch.lerp(untold, told, guidance[:, None, None, None])
    return (trainer.model(noisy, level, text, pooled, guidance, spacing).float() - target).square().mean()


@torch.no_grad()
def sample(model: FluxModel, captions: list[str], seed: int, tokens: int = GRID, steps: int = 16,
           guidance: float = 2.0) -> Tensor:  # fmt: skip
    """Return latents that the model makes of captions, by Euler steps along its velocity."""
    side = tokens * model.config.patch
    latents = torch.randn(len(captions), 16, side, side, generator=torch.Generator().manual_seed(seed))
    text, pooled = (torch.stack(part) for part in zip(*map(encoded, captions), strict=True))
    levels = torch.linspace(1, 0, steps + 1)
    levels = SHIFTS[tokens] * levels / (1 + (SHIFTS[tokens] - 1) * levels)
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        level, strength = now.expand(len(captions)), torch.full((len(captions),), guidance)
        latents = latents + (then - now) * model(latents, level, text, pooled, strength, GRID / tokens)
    return latents


def run(folder: Path, device: str, stages: tuple[Stage, ...] = STAGES) -> None:
    """Train to the end of the stages; see `flow_training.train_stages`."""
    train_stages(Trainer(device=device), folder, stages)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's FLUX on pictures of lakes.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".comfyui" / "lake")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    run(args.folder, args.device)


if __name__ == "__main__":
    main()
