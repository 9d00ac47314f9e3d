"""Sample sheets: strips of pictures that experiments keep, and the sheets that are made of them."""

from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from .experiments import SUITES, TRAININGS

HERE = Path(__file__).resolve().parent
STRIPS = HERE / "strips"
SHOWN = {"methods": "lake", "video": "clips"}  # suites of which pictures are kept, and their teachers
HEIGHT, TITLE = 112, 14  # pixels of a strip; of the line above it


def save_strip(pictures: Tensor, path: Path) -> None:
    """Keep pictures (n, H, W, 3) from 0 to 1 side by side."""
    found = [Image.fromarray((each * 255).round().byte().numpy()) for each in pictures.float().cpu().clamp(0, 1)]
    width = round(HEIGHT * found[0].width / found[0].height)
    strip = Image.new("RGB", (width * len(found), HEIGHT))
    for place, picture in enumerate(found):
        strip.paste(picture.resize((width, HEIGHT), Image.Resampling.BICUBIC), (place * width, 0))
    path.parent.mkdir(exist_ok=True)
    strip.save(path, quality=85, optimize=True)


def strip_path(suite: str, method: str, training: str) -> Path:
    """Return where the pictures of a method are kept."""
    return STRIPS / f"{suite} {method} {training}.jpg".replace(",", "").replace(" ", "_")


def write_sheet(suite: str, path: Path) -> None:
    """Write the strips of a suite: a row per method, a column per training, the teacher above; nothing without any."""
    teacher = STRIPS / f"{SHOWN[suite]}.jpg"
    every = SUITES[suite]()
    trainings = [training for training in TRAININGS if any(each.training == training for each in every)]
    rows = {
        name: [strip_path(suite, name, training) for training in trainings]
        for name in dict.fromkeys(each.method.name for each in every)
    }
    rows = {name: strips for name, strips in rows.items() if any(strip.exists() for strip in strips)}
    if not rows or not teacher.exists():
        return
    width = Image.open(teacher).width
    sheet = Image.new("RGB", ((width + 4) * len(trainings), (HEIGHT + TITLE) * (len(rows) + 1)), "white")
    pen = ImageDraw.Draw(sheet)
    cells = [("the teacher", teacher, 0, 0)]
    cells += [(f"{name}, {training}", strip, column, line) for line, (name, strips) in enumerate(rows.items(), 1)
              for column, (training, strip) in enumerate(zip(trainings, strips, strict=True))]  # fmt: skip
    for title, strip, column, line in cells:
        if strip.exists():
            x, y = column * (width + 4), line * (HEIGHT + TITLE)
            pen.text((x + 2, y + 1), title, fill="black")
            sheet.paste(Image.open(strip), (x, y + TITLE))
    sheet.save(path, quality=85, optimize=True)
