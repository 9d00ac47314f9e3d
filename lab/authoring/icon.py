"""Draw the pack's icon and banner: `python -m lab.authoring.icon` writes docs/icon.png and docs/banner.png.

A picture seen as foveated attention sees it: fine cells where it matters, coarse ones elsewhere. The Registry takes a
square icon of at most 400 pixels and a banner of 21 to 9.
"""

from PIL import Image, ImageDraw, ImageFont

from .. import ROOT

BACK, LINE, TEXT = (24, 27, 34), (24, 27, 34), (240, 242, 246)
DUSK = ((58, 66, 116), (214, 92, 84), (250, 196, 110))  # colours from the top of the sky to the sun
SIDE = 256


def colour(share: float) -> tuple[int, ...]:
    """Return the colour of a height, 0 at the top and 1 at the horizon."""
    place = min(max(share, 0.0), 1.0) * (len(DUSK) - 1)
    first = min(int(place), len(DUSK) - 2)
    mix = place - first
    return tuple(round(a + (b - a) * mix) for a, b in zip(DUSK[first], DUSK[first + 1], strict=True))


def cells(left: float, top: float, side: float, focus: tuple[float, float]) -> list[tuple[float, float, float]]:
    """Return (left, top, side) of squares that are the finer, the nearer they lie to a point."""
    distance = max(abs(left + side / 2 - focus[0]), abs(top + side / 2 - focus[1]))
    if side <= 8 or distance > side * 2.2:
        return [(left, top, side)]
    half = side / 2
    return [each for x in (left, left + half) for y in (top, top + half) for each in cells(x, y, half, focus)]


def draw_fovea(width: int, height: int, focus: tuple[float, float]) -> Image.Image:
    """Return a picture of squares around a point."""
    image = Image.new("RGB", (width, height), BACK)
    draw = ImageDraw.Draw(image)
    for x in range(0, width, 64):
        for y in range(0, height, 64):
            for left, top, side in cells(x, y, 64, focus):
                shade = colour(1 - abs(top + side / 2 - focus[1]) / (height * 0.7))
                draw.rectangle((left + 1, top + 1, left + side - 2, top + side - 2), fill=shade)
    return image


def main() -> None:
    """Write both."""
    draw_fovea(SIDE, SIDE, (SIDE * 0.58, SIDE * 0.55)).quantize(64).save(ROOT / "docs" / "icon.png", optimize=True)
    banner = draw_fovea(1344, 576, (940.0, 300.0))
    draw = ImageDraw.Draw(banner)
    draw.rounded_rectangle((56, 180, 700, 400), 24, fill=BACK)
    draw.text((88, 200), "Linearize", fill=TEXT, font=ImageFont.load_default(104))
    draw.text((92, 330), "attention where it matters", fill=TEXT, font=ImageFont.load_default(44))
    banner.quantize(64).save(ROOT / "docs" / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
