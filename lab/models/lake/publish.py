"""Write what training made: the model file, a sample sheet, the loss curve and the scores.

`python -m lab.models.lake.publish` after `train.py` and `train_autoencoder.py`; needs `pip install matplotlib`.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import ROOT
from ..flow_training import write_curve
from .autoencoder import Autoencoder
from .flux_model import FluxConfig, FluxModel
from .scenes import draw_scenes, render
from .scores import house_of, reflection, reflection_of_others
from .train import sample
from .train_autoencoder import quality

matplotlib.use("Agg")
MODELS = ROOT / "lab" / "models"
JUDGED, BATCH, SHEET = 48, 8, 16


def load_model(folder: Path) -> FluxModel:
    """Return the averaged model of a training folder."""
    state = load_file(folder / "checkpoint.safetensors")
    model = FluxModel(FluxConfig())
    model.load_state_dict({k.removeprefix("average."): v for k, v in state.items() if k.startswith("average.")})
    return model.eval()


def load_autoencoder() -> Autoencoder:
    """Return the shipped autoencoder."""
    state = {k: v.float() for k, v in load_file(MODELS / "linearize_lake_vae.safetensors").items() if "taesd" in k}
    autoencoder = Autoencoder()
    autoencoder.load_state_dict(state)
    return autoencoder


@torch.no_grad()
def judge(model: FluxModel, autoencoder: Autoencoder, seed: int = 1) -> tuple[dict[str, float], list[str], Tensor]:
    """Return the scores over JUDGED captions, the first SHEET captions, and their pictures (SHEET, 3, 512, 512)."""
    scenes = draw_scenes(JUDGED, torch.Generator().manual_seed(777))
    captions, pictures = scenes.captions(), []
    for first in range(0, JUDGED, BATCH):
        latents = sample(model, captions[first : first + BATCH], seed + first)
        pictures.append(autoencoder.decode(latents).clamp(0, 1))
    painted, drawn = torch.cat(pictures), render(scenes, 512)
    colours, sides = house_of(painted, scenes.choices["time"])
    scores = {
        "reflection": reflection(painted).mean().item(),
        "reflection, other picture": reflection_of_others(painted).mean().item(),
        "reflection, drawn scene": reflection(drawn).mean().item(),
        "house has colour and side of the caption": (
            ((colours == scenes.choices["colour"]) & (sides == scenes.choices["side"])).float().mean().item()
        ),
    }
    return scores, captions[:SHEET], painted[:SHEET]


def write_sheet(captions: list[str], pictures: Tensor) -> None:
    """Save the pictures, four to a row, each under its caption."""
    figure, axes = plt.subplots(4, 4, figsize=(12, 12.8), layout="constrained")
    for axis, caption, picture in zip(axes.flat, captions, pictures, strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        words = caption.split()
        axis.set_title(f"{' '.join(words[:4])}\n{' '.join(words[4:])}", fontsize=8)
        axis.axis("off")
    figure.savefig(MODELS / "samples.png", dpi=80)
    image = Image.open(MODELS / "samples.png").convert("RGB")
    image.save(MODELS / "samples.jpg", quality=85, optimize=True)
    (MODELS / "samples.png").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model file, sample sheet, loss curve and scores.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".comfyui" / "lake")
    folder = parser.parse_args().folder
    model, autoencoder = load_model(folder), load_autoencoder()
    save_file(
        {name: tensor.half() for name, tensor in model.state_dict().items()}, MODELS / "linearize_lake_flux.safetensors"
    )
    scores, captions, pictures = judge(model, autoencoder)
    ours, bicubic = quality(autoencoder)
    scores |= {"decoder, dB": ours, "bicubic enlargement, dB": bicubic}
    (MODELS / "scores.json").write_text(
        json.dumps({name: round(score, 3) for name, score in scores.items()}, indent=2) + "\n", encoding="utf-8"
    )
    write_sheet(captions, pictures)
    write_curve(folder, MODELS / "loss.png")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
