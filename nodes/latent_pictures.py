"""Pictures of latents on the nodes that train: by a VAE where one is wired, else by ComfyUI's own previews."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import latent_preview
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..attention.runtime.record import once

MOST_PIXELS = 512  # a side of a preview
MOST_PICTURES = 8  # on a contact sheet
Show = Callable[[Tensor], Image.Image | None]


def vae_input(shows: str) -> Any:
    """Return the optional input `vae`; `shows` says of what it makes pictures."""
    return io.Vae.Input("vae", optional=True, tooltip=f"Shows {shows} as real pictures; without it ComfyUI's previews "
                        "stand in, if they are switched on.")  # fmt: skip


def shower(vae: Any, device: torch.device, latent_format: Any) -> Show | None:
    """Return what makes a picture of a latent in the model's own scale, None where nothing can."""
    previewer = latent_preview.get_previewer(device, latent_format)
    if vae is None:
        return None if previewer is None else previewer.decode_latent_to_preview

    def show(latent: Tensor) -> Image.Image | None:
        found = decoded(vae, latent_format.process_out(latent))
        return previewer.decode_latent_to_preview(latent) if found is None and previewer is not None else found

    return show


def decoded(vae: Any, latent: Tensor) -> Image.Image | None:
    """Return a VAE's picture of the first latent of a batch, of a clip its middle frame.

    None where the memory that is free does not hold the VAE beside what trains, or decoding fails; said once.
    """
    latent = latent[:1]
    if latent.ndim == 5:
        middle = latent.shape[2] // 2
        latent = latent[:, :, middle : middle + 1]
    try:
        if not _has_room(vae, latent):
            once.info("Linearize: no memory is free for the VAE beside what trains, so its pictures are left out")
            return None
        with torch.inference_mode():
            pixels = vae.decode(latent.to(torch.float32).cpu())
        return to_picture(pixels.reshape(-1, *pixels.shape[-3:])[0])
    except Exception as error:  # a picture must not end a training
        once.warning(f"Linearize: the VAE could not show a latent: {type(error).__name__}: {str(error)[:200]}")
        return None


def _has_room(vae: Any, latent: Tensor) -> bool:
    """Return whether a VAE fits beside what is loaded: loading it must not push a model out that trains."""
    device = vae.patcher.load_device
    if comfy.model_management.is_device_cpu(device):
        return True
    free: Any = comfy.model_management.get_free_memory(device)
    return free > 1.1 * (vae.memory_used_decode(latent.shape, vae.vae_dtype) + vae.patcher.model_size())


def to_picture(pixels: Tensor) -> Image.Image:
    """Return (H, W, C) of 0 to 1 as a picture of at most MOST_PIXELS a side."""
    image = Image.fromarray((pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()[..., :3])
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return image


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures in a row, as high as the highest."""
    gap = 4
    width, height = sum(each.width + gap for each in pictures) - gap, max(each.height for each in pictures)
    row, x = Image.new("RGB", (width, height)), 0
    for each in pictures:
        row.paste(each, (x, 0))
        x += each.width + gap
    return row


def as_preview(image: Image.Image) -> tuple[str, Image.Image, int]:
    """Return a picture as ComfyUI's progress bar takes it: small ones are enlarged, none is made smaller."""
    return "JPEG", image, max(MOST_PIXELS, *image.size)


def contact_sheet(show: Callable[[Tensor], Image.Image | None], latents: Sequence[Tensor]) -> Tensor | None:
    """Return pictures of some latents in a row, (1, H, W, 3) of 0 to 1, None where nothing can be shown."""
    found = [picture for picture in map(show, latents[:MOST_PICTURES]) if picture is not None]
    if not found:
        return None
    row = torch.frombuffer(bytearray(side_by_side(found).tobytes()), dtype=torch.uint8)
    height = max(each.height for each in found)
    return row.reshape(1, height, -1, 3).float() / 255
