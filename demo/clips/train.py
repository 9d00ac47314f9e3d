"""Train the demo's video model on clips of a ball and a tower: `python demo/clips/train.py`. Resumes where it stopped.

Stages grow the picture; coarse grids get the rotary places of the fine one, so that a place means the same all through.
Frames are the same in all stages. Guidance is classifier-free, as with Wan: a tenth of the captions is left out.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scenes import FRAMES, draw_scenes, render
from torch import Tensor
from wan_model import WanConfig, WanModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "nodes"))  # the demo's node pack, which ComfyUI links
from captions import encode_caption  # noqa: E402
from clip_latents import CELL, latents_of  # noqa: E402

GRID = (12, 16)  # rows and columns of tokens at which the model is meant to be used: 192 x 256 pixels in ComfyUI
PATCH = 2  # latent cells per side of a token
DROP = 0.1  # share of captions replaced by nothing, for guidance
SHIFT = 8.0  # of the noise levels when sampling; what ComfyUI takes for Wan 2.1
MATRIX_RATE, OTHER_RATE = 2.4e-3, 1.5e-3


@dataclass(frozen=True)
class Stage:
    """Some steps of training at one size; the learning rate goes from `start` to `end` times its full value.

    Args:
        grid: rows and columns of tokens; a clip has 5 latent frames of them.
        shift, spread: of the noise levels; larger pictures want more of the high ones, where the ball's path is chosen.
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


class Trainer:
    """Model, averaged model, optimisers and step number.

    Args:
        seed: of the weights and, with the step number, of all data and noise.
    """

    def __init__(self, seed: int = 0, device: str = "cpu", config: WanConfig | None = None) -> None:
        self.seed, self.step, self.device = seed, 0, device
        config = config or WanConfig()
        self.model, self.average = WanModel(config), WanModel(config)
        self.model.initialise(seed)
        self.average.load_state_dict(self.model.state_dict())
        self.model.to(device)
        self.average.to(device).requires_grad_(False)
        blocks = [p for n, p in self.model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
        others = [p for p in self.model.parameters() if not any(p is block for block in blocks)]
        self.optimisers = [
            torch.optim.Muon(blocks, lr=MATRIX_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def advance(self, stage: Stage, done: int) -> float:
        """Take one step, the `done`-th of its stage; return the loss."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        clean, noise, level, text = (part.to(self.device) for part in draw_batch(stage, generator))
        noisy = torch.lerp(clean, noise, level[:, None, None, None, None])
        with torch.autocast(self.device, torch.bfloat16):
            velocity = self.model(noisy, level, text, stage.spacing)
        loss = (velocity.float() - (noise - clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = (stage.start + (stage.end - stage.start) * done / stage.steps) * min(1.0, (done + 1) / 40)
        for optimiser, full in zip(self.optimisers, (MATRIX_RATE, OTHER_RATE), strict=True):
            optimiser.param_groups[0]["lr"] = full * rate
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        keep = min(0.996, (self.step + 1) / (self.step + 12))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        """Write everything that training needs to go on, as one safetensors file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
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
        for index, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, tensor in groups.get("optimiser", {}).items():
                which, number, name = key.split(".", 2)
                if int(which) == index:
                    states.setdefault(int(number), {})[name] = tensor
            optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})


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
    """Train to the end of the stages, saving every 100 steps; a second call goes on where the first stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer, checkpoint, log = Trainer(0, device, config), folder / "checkpoint.safetensors", folder / "training.jsonl"
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
    parser = argparse.ArgumentParser(description="Train the demo's video model on clips of a ball and a tower.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / ".comfyui" / "clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", action="store_true", help="the longer training at 1,500 tokens, meant for a GPU")
    args = parser.parse_args()
    run(args.folder, args.device, LARGE if args.large else STAGES)


if __name__ == "__main__":
    main()
