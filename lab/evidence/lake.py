"""The image teacher: the demo's small FLUX, which draws a house and a tree at a lake that mirrors them."""

from typing import Any

import torch
from torch import Tensor

from ..models.lake.latents import latents_of
from ..models.lake.scenes import Scenes, draw_scenes, render, scenes_of_captions
from ..models.lake.scores import house_of, reflection

CLASSIFIED = 64  # pixels a side of what the classifier sees


class Lake:
    """What experiments need of it; a size is its number of tokens a side.

    Args:
        nodes: ComfyUI's module of that name.
    """

    name, host, file = "lake", "flux", "linearize_lake_flux.safetensors"
    size, prompts, steps = 32, 64, 8  # of the training samples
    tests, test_steps, cfg, guidance = 8, 10, 1.0, 2.0
    asked, channels = ("time", "colour", "side"), 3  # what the classifier tells, and of how many channels

    def __init__(self, nodes: Any) -> None:
        with torch.inference_mode():
            self._autoencoder = nodes.VAELoader().load_vae("linearize_lake_vae.safetensors")[0]

    def draw(self, count: int, seed: int) -> Scenes:
        """Return scenes by chance."""
        return draw_scenes(count, torch.Generator().manual_seed(seed))

    def drawn_latents(self, captions: list[str], seed: int) -> Tensor:
        """Return latents, in the model's units, of scenes drawn for captions."""
        scenes = scenes_of_captions(captions, torch.Generator().manual_seed(seed))
        return latents_of(render(scenes, 4 * self.size))

    def empty(self, size: int, count: int) -> dict[str, Tensor]:
        """Return empty latents as ComfyUI's nodes pass them on."""
        return {"samples": torch.zeros(count, 16, 2 * size, 2 * size)}

    def dimensions(self, size: int) -> tuple[int, int, int]:
        """Return width and height in pixels, and the frames."""
        return 16 * size, 16 * size, 1

    def pictures(self, latents: Tensor) -> Tensor:
        """Return latents as pictures (B, H, W, 3) from 0 to 1."""
        with torch.inference_mode():
            return self._autoencoder.decode(latents).clamp(0, 1)

    def shown(self, pictures: Tensor) -> Tensor:
        """Return the pictures that sheets show, (n, H, W, 3)."""
        return pictures[:2]

    def views(self, pictures: Tensor) -> Tensor:
        """Return what the classifier sees of pictures, (B, channels, H, W)."""
        return pictures.movedim(-1, 1).float()

    def drawn_views(self, scenes: Scenes) -> Tensor:
        """Return what the classifier sees of drawn scenes."""
        return render(scenes, CLASSIFIED)

    def structure(self, pictures: Tensor, scenes: Scenes) -> dict[str, float]:
        """Return the lake's mirror (correlation with the land), and how often the house is as the caption says."""
        images = pictures.movedim(-1, 1).float()
        colours, sides = house_of(images, scenes.choices["time"])
        right = (colours == scenes.choices["colour"]) & (sides == scenes.choices["side"])
        return {"mirror": float(reflection(images).mean()), "house": float(right.float().mean())}
