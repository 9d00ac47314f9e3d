"""Write what training made: the video model's file, a sample sheet, the loss curve and the scores.

`python -m lab.models.clips.publish` after `train.py`; needs `pip install matplotlib`. With `--only-scores` it
judges a checkpoint and leaves the model file alone.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import ROOT
from ...demo.nodes.clip_latents import clips_of, latents_of
from ..flow_training import write_curve
from .scenes import draw_scenes, render
from .scores import judge, judge_chance
from .train import GRID, SHIFT, sample
from .wan_model import WanConfig, WanModel

MODELS = ROOT / "lab" / "models"
FILE = "linearize_clips_wan.safetensors"
JUDGED, BATCH, SHEET = 32, 8, 6
SHOWN = (0, 3, 5, 7, 9, 11, 13, 16)  # frames of a clip on the sheet


def load_model(folder: Path) -> WanModel:
    """Return the averaged model of a training folder, in the precision of the file that is shipped."""
    state = load_file(folder / "checkpoint.safetensors")
    model = WanModel(WanConfig())
    model.load_state_dict(
        {k.removeprefix("average."): v.bfloat16() for k, v in state.items() if k.startswith("average.")}
    )
    return model.eval()


def write_model(model: WanModel, path: Path) -> None:
    """Save weights under the names of Wan 2.1; ComfyUI reads the width of the text from the metadata."""
    rows, columns = GRID
    metadata = {
        "format": "pt",
        "config": json.dumps({"transformer": {"text_dim": model.config.text}}),
        "title": "Linearize demo: a ball behind a tower",
        "made_by": "demo/clips",
        "size": f"{16 * columns} x {16 * rows} pixels, 17 frames",
        "shift": str(SHIFT),
        "license": "Apache-2.0",
    }
    save_file({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path, metadata)


@torch.no_grad()
def sampled(model: WanModel, count: int = JUDGED, seed: int = 1) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """Return what the captions of some held-out scenes name, the captions, and clips that the model makes of them."""
    scenes = draw_scenes(count, torch.Generator().manual_seed(777))
    captions, clips = scenes.captions(), []
    for first in range(0, count, BATCH):
        clips.append(clips_of(sample(model, captions[first : first + BATCH], seed + first)))
    return scenes.choices, captions, torch.cat(clips)


def all_scores(choices: dict[str, Tensor], clips: Tensor) -> dict[str, dict[str, float]]:
    """Return the scores of sampled clips, of drawn ones with and without the codec, and of chance."""
    scenes = draw_scenes(96, torch.Generator().manual_seed(778))
    drawn = render(scenes)
    coded = clips_of(latents_of(drawn))
    error = (coded - drawn).square().mean().log10().item()
    table = {
        "sampled": judge(clips, choices),
        "sampled, wrong pairs": judge_chance(clips, choices),
        "drawn": judge(drawn, scenes.choices),
        "drawn, through the latents": judge(coded, scenes.choices),
        "drawn, wrong pairs": judge_chance(drawn, scenes.choices),
        "latents": {"error, dB": -10 * error},
    }
    return {row: {name: round(value, 3) for name, value in scores.items()} for row, scores in table.items()}


def write_sheet(captions: list[str], clips: Tensor, path: Path) -> None:
    """Save some frames of each clip as a row under its caption."""
    rows, columns = (2 * side for side in clips.shape[-2:])
    step = rows + 16
    sheet = Image.new("RGB", ((columns + 2) * len(SHOWN), step * len(clips)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (caption, clip) in enumerate(zip(captions, clips, strict=True)):
        pen.text((2, row * step + 2), caption, fill="black")
        for column, frame in enumerate(SHOWN):
            pixels = (clip[:, frame].permute(1, 2, 0) * 255).round().byte().numpy()
            picture = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * (columns + 2), row * step + 15))
    sheet.save(path, quality=88, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the video model's file, sample sheet, loss curve and scores.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".comfyui" / "clips")
    parser.add_argument("--only-scores", action="store_true", help="judge a checkpoint, write the sheet beside it")
    args = parser.parse_args()
    model = load_model(args.folder)
    choices, captions, clips = sampled(model)
    scores = all_scores(choices, clips)
    print(json.dumps(scores, indent=2))
    sheet = (args.folder if args.only_scores else MODELS) / "clips_samples.jpg"
    write_sheet(captions[:SHEET], clips[:SHEET], sheet)
    if args.only_scores:
        return
    write_model(model, MODELS / FILE)
    (MODELS / "clips_scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    write_curve(args.folder, MODELS / "clips_loss.png")


if __name__ == "__main__":
    main()
