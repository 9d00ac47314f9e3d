"""Sheets of what attention without training paints: `python -m lab.evidence.untrained_sheet`.

A row per method, the teacher's on top, from the first seed of noise of `untrained.py`; pictures of several captions, or
frames of one clip.
"""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .figures import FIGURES
from .laboratory import Laboratory
from .rivals import add_rivals
from .sheets import HEIGHT, TITLE
from .untrained import QUESTIONS, Trial

SHOWN = {  # question: names of methods, best last
    "pictures": (
        "clear r=8", "clear r=7 pooled 4", "tiles of 4 top=0.16, rest dropped", "Sol-Attn runs of 16 tau=2",
        "PISA runs of 16 top=0.09", "foveated top=0 tile=4 radius=3 levels=3", "foveated top=0.1 tile=4",
    ),
    "clips": (
        "clear r=5", "tiles of 2 top=0.22, rest dropped", "Sol-Attn runs of 16 tau=1", "PISA runs of 16 top=0.19",
        "foveated top=0.22 tile=2 frames=5",
    ),
}  # fmt: skip
FRAMES = (2, 6, 10, 14)  # of a clip


def strip_of(pictures: Tensor) -> Image.Image:
    """Return pictures (n, H, W, 3) from 0 to 1 side by side."""
    found = [Image.fromarray((each * 255).round().byte().numpy()) for each in pictures.float().cpu().clamp(0, 1)]
    width = round(HEIGHT * found[0].width / found[0].height)
    strip = Image.new("RGB", (width * len(found), HEIGHT))
    for place, picture in enumerate(found):
        strip.paste(picture.resize((width, HEIGHT), Image.Resampling.BICUBIC), (place * width, 0))
    return strip


def write_sheet(question: str) -> None:
    """Sample the methods of a question that are shown, and write their sheet."""
    asked = QUESTIONS[question]
    laboratory = Laboratory(asked.teacher, device="cpu")
    add_rivals(laboratory)
    trial, methods = Trial(laboratory, asked, asked.seeds[0]), {each.name: each for each in asked.methods}
    rows = [("dense", trial.pictures)]
    for name in SHOWN[question]:
        spec = laboratory.module("attention.spec_json").spec_from_json(methods[name].spec)
        model = laboratory.apply(laboratory.module("attention.plans").Plan(laboratory.teacher.host, spec))
        latents = laboratory.latents(model, trial.tokens, trial.captions, trial.noise)
        rows.append((name, laboratory.teacher.pictures(latents)))
    strips = [(name, strip_of(pictures[list(FRAMES)] if question == "clips" else pictures)) for name, pictures in rows]
    sheet = Image.new("RGB", (strips[0][1].width, (HEIGHT + TITLE) * len(strips)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (name, strip) in enumerate(strips):
        pen.text((2, line * (HEIGHT + TITLE) + 1), name, fill="black")
        sheet.paste(strip, (0, line * (HEIGHT + TITLE) + TITLE))
    sheet.save(FIGURES / f"untrained_{question}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    for each in SHOWN:
        write_sheet(each)
