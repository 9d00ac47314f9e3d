"""What the demos read from a server's run: receipts in its pictures, measures of Compare with Teacher, the origin."""

import json
import re
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from linearize.attention.plans import Plan

from ..origin import origin
from ..server import LiveServer, ServerProblem


def picture_of(server: LiveServer, saved: dict[str, str]) -> Image.Image:
    """Return a picture that an output names."""
    return Image.open(BytesIO(server.image(saved)))


def receipt_of(picture: Image.Image, kind: str, sites: Sequence[str]) -> dict[str, Any]:
    """Return the receipt of a picture that was made with one kind of attention at all sites of a model.

    Raises:
        ServerProblem: the picture has no receipt, or a site ran another kind or dense attention.
    """
    text = str(picture.info.get("linearize", "[]"))
    for receipt in json.loads(text):
        specs = Plan.from_json(receipt["plan"]).resolve(sites)
        if receipt["share_linearized"] == 1 and all(specs[site].kind == kind for site in sites):
            return receipt
    raise ServerProblem(f"not every attention site ran on {kind}; the picture's receipt says: {text}")


def measures_of(outputs: dict[str, Any]) -> tuple[float, float]:
    """Return PSNR in dB and SSIM from the text of Compare with Teacher, its only output that a client sees.

    Raises:
        ServerProblem: it gave none.
    """
    text = outputs["LinearizeCompare"]["text"][0]
    found = re.search(r"PSNR ([\d.]+) dB.*SSIM ([\d.]+)", text, flags=re.DOTALL)
    if found is None:
        raise ServerProblem(f"Compare with Teacher gave no measures:\n{text}")
    return float(found[1]), float(found[2])


def told(seconds: float) -> dict[str, Any]:
    """Return where, with what and when a demo's table was made, and the seconds that it took."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    return {**origin("cpu"), "device": device, "seconds": round(seconds)}
