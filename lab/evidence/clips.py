"""The video teacher: the demo's small Wan, whose ball flies behind a tower while water mirrors it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo.nodes.clip_latents import clips_of, latents_of, of_comfyui
from ..models.clips.scenes import FRAMES, Scenes, draw_scenes, render, scenes_of_captions
from ..models.clips.scores import judge

SEEN = (0, FRAMES // 2, FRAMES - 1)  # the frames that the classifier sees, one behind the other
CLASSIFIED = (48, 64)


class Clips:
    """What experiments need of it; a size is its number of token columns, and rows are three quarters of it.

    Args:
        nodes: ComfyUI's module of that name; not used, since frames need no autoencoder.
    """

    name, host, file = "clips", "wan", "linearize_clips_wan.safetensors"
    size, prompts, steps = 16, 48, 10  # of the training samples
    tests, test_steps, cfg, guidance = 6, 12, 2.0, None
    asked, channels = ("time", "colour", "way", "tower"), 3 * len(SEEN)

    def __init__(self, nodes: Any) -> None:
        del nodes

    def draw(self, count: int, seed: int) -> Scenes:
        """Return scenes by chance."""
        return draw_scenes(count, torch.Generator().manual_seed(seed))

    def drawn_latents(self, captions: list[str], seed: int) -> Tensor:
        """Return latents, in the model's units, of scenes drawn for captions."""
        scenes = scenes_of_captions(captions, torch.Generator().manual_seed(seed))
        return latents_of(render(scenes, (3 * self.size, 4 * self.size)))

    def empty(self, size: int, count: int) -> dict[str, Tensor]:
        """Return empty latents as ComfyUI's nodes pass them on."""
        return {"samples": torch.zeros(count, 16, (FRAMES - 1) // 4 + 1, 3 * size // 2, 2 * size)}

    def dimensions(self, size: int) -> tuple[int, int, int]:
        """Return width and height in pixels, and the frames."""
        return 16 * size, 12 * size, FRAMES

    def pictures(self, latents: Tensor) -> Tensor:
        """Return latents as frames (B * FRAMES, H, W, 3) from 0 to 1, clip after clip."""
        return clips_of(of_comfyui(latents.float().cpu())).permute(0, 2, 3, 4, 1).flatten(0, 1)

    def shown(self, pictures: Tensor) -> Tensor:
        """Return the frames that sheets show, (n, H, W, 3)."""
        return pictures[[2, 6, 10, 14]]

    def views(self, pictures: Tensor) -> Tensor:
        """Return what the classifier sees of frames, (B, channels, H, W)."""
        return _seen(_clips(pictures))

    def drawn_views(self, scenes: Scenes) -> Tensor:
        """Return what the classifier sees of drawn scenes."""
        return _seen(render(scenes, CLASSIFIED))

    def structure(self, pictures: Tensor, scenes: Scenes) -> dict[str, float]:
        """Return the mirror of what moves, and how often the ball behind the tower comes out as the caption says."""
        found = judge(F.interpolate(_clips(pictures), (FRAMES, *CLASSIFIED)), scenes.choices)
        return {"mirror": found["mirror, moving"], "ball": found["ball after the tower"]}


def _clips(pictures: Tensor) -> Tensor:
    return pictures.float().unflatten(0, (-1, FRAMES)).permute(0, 4, 1, 2, 3)


def _seen(clips: Tensor) -> Tensor:
    return clips[:, :, list(SEEN)].transpose(1, 2).flatten(1, 2)
