"""Kandinsky 6, video with sound.

Sequence: the main grid, and behind it the start picture where there is one, which is global. Text comes in through
cross-attention, sound through attention between the two streams; both are left alone, and so is the sound's own.
"""

from typing import Any

from ..layout import Reason, TokenLayout, grid_segment, reference_segment
from .base import Host, ModelCall, Site, grid_of, missing_structure, numbered_sites, planned_main

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4
STRUCTURE = (
    "visual_embeddings.in_layer",
    "audio_embeddings",
    "video_text_transformer_blocks",
    "visual_blocks.0.videoT.self_attention.to_query",
    "visual_blocks.0.audioT.self_attention.to_query",
    "visual_blocks.0.va_cross_attention",
    "rope_embedder_3d",
    "out_layer",
)


class Kandinsky6Host(Host):
    """Kandinsky 6: 60 blocks, head dimension 128."""

    name = "kandinsky6"
    title = "Kandinsky 6"
    default_text_tokens = 0  # text is no part of the sequence

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.visual_blocks[0].videoT.self_attention
        return numbered_sites("blocks", len(module.visual_blocks), attention.num_heads, attention.head_dim)

    def site_modules(self, module: Any) -> dict[str, str]:
        """The block index names the attentions of video, sound and text alike."""
        return {f"blocks.{i}": f"visual_blocks.{i}.videoT.self_attention" for i in range(len(module.visual_blocks))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """The latent is a video and its sound."""
        latents = call.argument(0, "x")
        if not isinstance(latents, list | tuple) or len(latents) != 2 or getattr(latents[0], "ndim", 0) != 5:
            return Reason("arguments", f"{self.title} was called without the video and sound that tell its tokens")
        frames, rows, columns = grid_of(latents[0], call.module.patch_size)
        # the start picture is the last frame, at the place of the first
        start = 1 if call.kwargs.get("k6_reference_tail") and frames > 1 else 0
        main = grid_segment("main", frames - start, rows, columns)
        return TokenLayout.of((main, *([reference_segment((1, rows, columns))] * start)))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Text is no part of it."""
        side, latent_frames = PIXELS_PER_LATENT * module.patch_size[1], (frames - 1) // FRAMES_PER_LATENT + 1
        return TokenLayout.of([planned_main(width, height, side, latent_frames)])

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every site."""
        return tuple(f"{path}.query_norm.weight" for path in self.site_modules(module).values())
