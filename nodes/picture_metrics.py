"""How far pictures are from the teacher's: PSNR, SSIM, a map of the difference, a sheet to look at.

Pictures are ComfyUI's: (B, height, width, channels) in 0 to 1, several for a clip. Nothing is resized or aligned here,
and nothing here imports ComfyUI. PSNR and SSIM are written out: kornia's SSIM takes whole pictures, where bands of rows
keep the float64 maps small, and ComfyUI runs without kornia too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention.words import counted

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03
SSIM_BAND = 64  # rows at a time
DIFFERENCE_GAIN = 8
COLOURS = 3
BACKGROUND, INK = (250, 250, 248), (40, 40, 40)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Measures of each frame.

    Args:
        width: in pixels.
        height: in pixels.
        psnr: dB per frame, float64; infinite where the frames are equal.
        ssim: per frame, float64; 1 where the frames are equal.
        largest: the largest difference of one colour value in 0 to 1, per frame, float64.
        notes: what was not a picture.
    """

    width: int
    height: int
    psnr: Tensor
    ssim: Tensor
    largest: Tensor
    notes: tuple[str, ...] = ()

    @property
    def worst_frame(self) -> int:
        """The frame with the lowest PSNR."""
        return int(self.psnr.argmin())

    def describe(self) -> str:
        """Return the measures as text, a line each."""
        count = len(self.psnr)
        lines = [
            f"{self.width} x {self.height}, {counted(count, 'frame')}",
            f"PSNR {_psnr_words(self.psnr)}",
            f"SSIM {_over_frames(self.ssim, 4, '')}",
            f"largest difference {float(self.largest.max()):.3f} of 1; the map shows differences x {DIFFERENCE_GAIN}",
        ]
        return "\n".join([*lines, *self.notes])


def compare(image: Tensor, teacher: Tensor) -> tuple[Comparison, Tensor]:
    """Return the measures of two batches and a sheet per frame: teacher, image, amplified difference.

    Values outside 0 to 1 count as saving writes them, and values that are no numbers as black. An alpha channel is not
    compared.

    Shapes:
        image, teacher: (B, height, width, channels), three channels or more; result: (B, higher, 3 times wider, 3).

    Raises:
        ValueError: the batches differ in size or number, or are too small for SSIM; the sentence gives the sizes.
    """
    if image.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            f"the image is {_size(image)} and the teacher {_size(teacher)}; render both at one size and with the same "
            "number of frames, or bring one to the other's size with Upscale Image"
        )
    if min(image.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, these are {_size(image)}")
    notes = tuple(
        f"the {name} holds values that are no numbers; they count as black"
        for name, each in (("image", image), ("teacher", teacher))
        if not bool(torch.isfinite(each).all())
    )
    image, teacher = as_saved(image), as_saved(teacher)
    pairs = list(zip(image, teacher, strict=True))
    psnr = torch.stack([_psnr(*pair) for pair in pairs])
    ssim = torch.stack([_ssim(*pair) for pair in pairs])
    largest = torch.stack([(one - other).abs().max().double() for one, other in pairs])
    _, height, width, _ = image.shape
    return Comparison(width, height, psnr, ssim, largest, notes), draw_sheet(image, teacher)


def as_saved(batch: Tensor) -> Tensor:
    """Return the colours of a batch in 0 to 1, float32, without what is no number."""
    colours = batch[..., :COLOURS].float()
    return colours.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)


def draw_sheet(image: Tensor, teacher: Tensor) -> Tensor:
    """Return teacher, image and difference side by side under their names, (B, height + caption, width, 3)."""
    count, height, width, _ = image.shape
    gap = max(4, width // 128)
    caption = max(18, height // 32)
    sheet = torch.tensor(BACKGROUND, device=image.device).float().div(255).repeat(count, caption + height, 1, 1)
    sheet = sheet.repeat(1, 1, 3 * width + 2 * gap, 1)
    strip = Image.new("RGB", (3 * width + 2 * gap, caption), BACKGROUND)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(caption * 0.7)
    titles = ("teacher", "image", f"difference x {DIFFERENCE_GAIN}")
    difference = (image - teacher).abs().mul(DIFFERENCE_GAIN).clamp(0, 1)
    for place, (title, picture) in enumerate(zip(titles, (teacher, image, difference), strict=True)):
        left = place * (width + gap)
        sheet[:, caption:, left : left + width] = picture
        draw.text((left + gap, caption // 2), title, INK, font=font, anchor="lm")
    sheet[:, :caption] = torch.from_numpy(np.asarray(strip, dtype=np.float32) / 255).to(sheet)
    return sheet


def _psnr(image: Tensor, teacher: Tensor) -> Tensor:
    """Return 10 log10(1 / mean squared error) of one frame, infinite where it is 0."""
    return -10 * torch.log10((image - teacher).double().square().mean())


def _ssim(image: Tensor, teacher: Tensor) -> Tensor:
    """Return the structural similarity of one frame, the mean over its colours and over every whole window.

    Source: Wang, Bovik, Sheikh, Simoncelli (2004): gaussian windows of 11 x 11, sigma 1.5, K1 0.01, K2 0.03.
    """
    height, width, colours = image.shape
    rows, columns = height - SSIM_WINDOW + 1, width - SSIM_WINDOW + 1
    total = torch.zeros((), dtype=torch.float64, device=image.device)
    for top in range(0, rows, SSIM_BAND):  # bands of windows keep the float64 maps small
        band = slice(top, min(top + SSIM_BAND, rows) + SSIM_WINDOW - 1)
        total += sum(_ssim_map(image[band, :, each], teacher[band, :, each]).sum() for each in range(colours))
    return total / (rows * columns * colours)


def _ssim_map(image: Tensor, teacher: Tensor) -> Tensor:
    """Return the similarity at every whole window of two (height, width) planes, float64."""
    c1, c2 = SSIM_K1**2, SSIM_K2**2  # the values span 1
    x, y = image.double(), teacher.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure


def _blur(plane: Tensor) -> Tensor:
    """Return the gaussian mean of every whole window of a (height, width) plane, one axis after the other."""
    for axis in (0, 1):
        size = plane.shape[axis] - SSIM_WINDOW + 1
        mean = torch.zeros_like(plane.narrow(axis, 0, size))
        for start, weight in enumerate(_gaussian()):
            mean.add_(plane.narrow(axis, start, size), alpha=weight)
        plane = mean
    return plane


def _gaussian() -> list[float]:
    place = torch.arange(SSIM_WINDOW, dtype=torch.float64, device="cpu") - SSIM_WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * SSIM_SIGMA**2))
    return (weights / weights.sum()).tolist()


def _psnr_words(psnr: Tensor) -> str:
    different = psnr[torch.isfinite(psnr)]
    num_equal = len(psnr) - len(different)
    if not len(different):
        return "equal"
    if not num_equal:
        return _over_frames(psnr, 2, " dB")
    return f"{_over_frames(psnr, 2, ' dB', different)}; {num_equal} of {len(psnr)} frames are equal"


def _over_frames(values: Tensor, digits: int, unit: str, taken: Tensor | None = None) -> str:
    """Return a value, or for several frames the mean (of `taken`) and the lowest with its frame, from 1."""
    if len(values) == 1:
        return f"{float(values):.{digits}f}{unit}"
    lowest = int(values.argmin())
    mean = float((values if taken is None else taken).mean())
    return f"{mean:.{digits}f}{unit} mean, {float(values[lowest]):.{digits}f}{unit} lowest (frame {lowest + 1})"


def _size(batch: Tensor) -> str:
    count, height, width = batch.shape[:3]
    return f"{width} x {height}, {counted(count, 'frame')}"
