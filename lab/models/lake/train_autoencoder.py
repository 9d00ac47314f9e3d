"""Train the end of the demo's decoder: `python -m lab.models.lake.train_autoencoder`. Some ten minutes on two cores."""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ... import ROOT
from .autoencoder import Autoencoder
from .latents import COLOURS, PHASES, latents_of
from .scenes import draw_scenes, render

SIZE, CROP, SCENES, CROPS = 512, 128, 2, 4  # pixels; scenes drawn a step, and crops of each
COLOUR_NOISE, PHASE_NOISE, NO_PHASE = 0.08, 0.10, 0.05  # a sampled latent is not exact; an encoded one has no phases

RATE, SMOOTH = 1e-3, 0.1  # of Adam; layers that carry the smooth doubling learn this much slower


def draw_crops(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pictures (B, 3, CROP, CROP) and noisy latents (B, 16, CROP / 8, CROP / 8) of them."""
    pictures = render(draw_scenes(SCENES, generator), SIZE)
    corners = torch.randint((SIZE - CROP) // 16 + 1, (SCENES * CROPS, 2), generator=generator) * 16
    crops = torch.stack([
        pictures[number % SCENES, :, top : top + CROP, left : left + CROP]
        for number, (top, left) in enumerate(corners.tolist())
    ])  # fmt: skip
    latents = latents_of(F.avg_pool2d(crops, 4))
    noise = torch.randn(latents.shape, generator=generator)
    amount = torch.rand(len(crops), 1, 1, 1, generator=generator)
    noise[:, :COLOURS] *= COLOUR_NOISE * amount
    noise[:, COLOURS:] *= PHASE_NOISE * amount
    without = torch.rand(len(crops), generator=generator) < NO_PHASE
    latents[without, COLOURS : COLOURS + PHASES] = 0
    return crops, latents + noise


@torch.no_grad()
def quality(autoencoder: Autoencoder, seed: int = 12345) -> tuple[float, float]:
    """Return the decoder's PSNR in dB on eight scenes it was not trained on, and that of bicubic enlargement."""
    pictures = render(draw_scenes(8, torch.Generator().manual_seed(seed)), SIZE)
    small = F.avg_pool2d(pictures, 4)
    results = autoencoder.decode(latents_of(small)), F.interpolate(small, scale_factor=4, mode="bicubic")
    ours, bicubic = (-10 * math.log10((each.clamp(0, 1) - pictures).square().mean()) for each in results)
    return ours, bicubic


def train(steps: int, seed: int = 0) -> Autoencoder:
    """Return the autoencoder after `steps` of Adam on the absolute error."""
    autoencoder, start = Autoencoder().requires_grad_(False), time.monotonic()
    parameters = list(autoencoder.doublings.requires_grad_().parameters())
    smooth = [p for layer in autoencoder.doublings if isinstance(layer, torch.nn.Conv2d) for p in layer.parameters()]
    rest = [p for p in parameters if not any(p is each for each in smooth)]
    optimiser = torch.optim.Adam([{"params": smooth}, {"params": rest}], betas=(0.9, 0.99))
    for step in range(steps):
        pictures, latents = draw_crops(torch.Generator().manual_seed(seed * 1_000_003 + step))
        cooling = 0.01 + 0.99 * math.cos(math.pi / 2 * step / steps)
        for group, factor in zip(optimiser.param_groups, (SMOOTH, 1.0), strict=True):
            group["lr"] = factor * RATE * min(1, (step + 1) / 50) * cooling
        features = autoencoder.unfolding(latents)
        with torch.autocast("cpu", torch.bfloat16):
            result = autoencoder.doublings(features).float()
        loss = (result - pictures).abs().mean() + 2 * (result - pictures).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 49:
            ours, bicubic = quality(autoencoder)
            print(
                f"step {step + 1}: {ours:.2f} dB (bicubic {bicubic:.2f}), {time.monotonic() - start:.0f} s", flush=True
            )
    return autoencoder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the end of the demo's decoder.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--file", type=Path, default=ROOT / "lab" / "models" / "linearize_lake_vae.safetensors")
    args = parser.parse_args()
    save_file(train(args.steps).state_for_comfyui(), args.file)


if __name__ == "__main__":
    main()
