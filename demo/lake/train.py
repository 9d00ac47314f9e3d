"""Train the demo's FLUX on pictures of lakes: `python demo/lake/train.py`. Saves every 100 steps, and resumes.

Stages grow the picture; coarse grids get the rotary places of the fine one, so that a place means the same all through.
The last stage distils guidance into the model, as FLUX.1-dev had it done: one forward then does the work of two.
"""

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flux_model import FluxConfig, FluxModel
from latents import COLOURS, latents_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scenes import draw_scenes, render
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "nodes"))  # the demo's node pack, which ComfyUI links
from captions import encode_caption  # noqa: E402

GRID = 32  # tokens a side at which the model is meant to be used: 512 pixels
DROP = 0.1  # share of captions replaced by nothing, for guidance
GUIDANCE = (1.0, 4.0)  # strengths that the last stage teaches
SHIFTS = {8: 1.5, 16: 2.2, 32: 3.0}  # tokens a side -> shift of the noise levels
MATRIX_RATE, OTHER_RATE = 2.4e-3, 1.5e-3


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


class Trainer:
    """Model, averaged model, optimisers and step number.

    Args:
        seed: of the weights and, with the step number, of all data and noise.
    """

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self.seed, self.step, self.device = seed, 0, device
        self.model, self.average = FluxModel(FluxConfig()), FluxModel(FluxConfig())
        self.model.initialise(seed)
        self.average.load_state_dict(self.model.state_dict())
        self.model.to(device)
        self.average.to(device).requires_grad_(False)
        self.teacher: FluxModel | None = None  # the averaged model as it was when distillation began
        blocks = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "_blocks." in n]
        others = [p for p in self.model.parameters() if not any(p is block for block in blocks)]
        self.optimisers = [
            torch.optim.Muon(blocks, lr=MATRIX_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def advance(self, stage: Stage, done: int) -> float:
        """Take one step, the `done`-th of its stage; return the loss."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        batch = [part.to(self.device) for part in draw_batch(stage, generator)]
        if stage.distil and self.teacher is None:
            self.teacher = copy.deepcopy(self.average)
        with torch.autocast(self.device, torch.bfloat16):
            loss = distillation_loss(self, stage, *batch) if stage.distil else flow_loss(self, stage, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = (stage.start + (stage.end - stage.start) * done / stage.steps) * min(1.0, (done + 1) / 40)
        for optimiser, full in zip(self.optimisers, (MATRIX_RATE, OTHER_RATE), strict=True):
            optimiser.param_groups[0]["lr"] = full * rate
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        keep = min(0.998, (self.step + 1) / (self.step + 12))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        """Write everything that training needs to go on, as one safetensors file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        if self.teacher:
            tensors |= {f"teacher.{name}": tensor for name, tensor in self.teacher.state_dict().items()}
        for index, optimiser in enumerate(self.optimisers):
            for number, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{index}.{number}.{name}": torch.as_tensor(v) for name, v in state.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"step": str(self.step), "seed": str(self.seed)})
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote."""
        with safe_open(path, "pt") as file:
            self.step, self.seed = int(file.metadata()["step"]), int(file.metadata()["seed"])
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(path, self.device).items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        self.model.load_state_dict(groups["model"])
        self.average.load_state_dict(groups["average"])
        if "teacher" in groups:
            self.teacher = copy.deepcopy(self.average)
            self.teacher.load_state_dict(groups["teacher"])
        for index, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, tensor in groups.get("optimiser", {}).items():
                which, number, name = key.split(".", 2)
                if int(which) == index:
                    states.setdefault(int(number), {})[name] = tensor
            optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})


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
    """Train to the end of the stages, saving every 100 steps; a second call goes on where the first stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer, checkpoint, log = Trainer(device=device), folder / "checkpoint.safetensors", folder / "training.jsonl"
    if checkpoint.exists():
        trainer.load(checkpoint)
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < trainer.step), encoding="utf-8")
    first = 0
    for stage in stages:
        start = time.monotonic()
        while first <= trainer.step < first + stage.steps:
            loss = trainer.advance(stage, trainer.step - first)
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {trainer.step}; delete {folder} and lower the rates")
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.step - 1, "stage": stage.name, "loss": round(loss, 5)}) + "\n")
            if trainer.step % 100 == 0 or trainer.step == first + stage.steps:
                trainer.save(checkpoint)
                print(
                    f"{stage.name}: step {trainer.step}, loss {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True
                )
        first += stage.steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's FLUX on pictures of lakes.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / ".comfyui" / "lake")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    run(args.folder, args.device)


if __name__ == "__main__":
    main()
