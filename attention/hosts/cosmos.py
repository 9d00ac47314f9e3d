"""Cosmos 1 (text and image to video).

Sequence: main grid (frames, rows, columns) and nothing else. A block is a list of layers: self-attention, attention to
the text, MLP.
"""

from typing import Any

from ..layout import Reason, TokenLayout
from .base import Host, ModelCall, Site, main_segment, missing_structure, planned_main

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 8  # after the first, which stands for itself
SELF_ATTENTION = ("fa", "full_attn")
STRUCTURE = (
    "x_embedder.proj",
    "block_x_format",
    "affline_norm",
    "patch_temporal",
    "blocks.block0.blocks.0.block_type",
    "blocks.block0.blocks.0.block.attn.to_q",
    "final_layer",
)


class CosmosHost(Host):
    """Cosmos 1: 28 blocks in the 7B models, 36 in 14B; head dimension 128."""

    name = "cosmos"
    title = "Cosmos 1"
    default_text_tokens = 0  # text is in cross-attention

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        heads, head_dim = module.num_heads, module.model_channels // module.num_heads
        return tuple(Site(site, heads, head_dim) for site in self.site_modules(module))

    def site_modules(self, module: Any) -> dict[str, str]:
        """Released models have one self-attention per block."""
        found = [
            f"blocks.block{i}.blocks.{j}.block.attn"
            for i in range(module.num_blocks)
            for j, layer in enumerate(getattr(module.blocks, f"block{i}").blocks)
            if layer.block_type in SELF_ATTENTION
        ]
        return {f"blocks.{i}": path for i, path in enumerate(found)}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, module = call.argument(0, "x"), call.module
        if getattr(latent, "ndim", 0) != 5:
            return Reason("arguments", f"{self.title} was called without the 5-D latent that tells its token grid")
        patch = (module.patch_temporal, module.patch_spatial, module.patch_spatial)
        return TokenLayout.of([main_segment(latent, patch)])

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Text is not part of the sequence."""
        latent_frames = (max(frames, 1) - 1) // FRAMES_PER_LATENT + 1
        in_time = latent_frames // module.patch_temporal
        return TokenLayout.of([planned_main(width, height, PIXELS_PER_LATENT * module.patch_spatial, in_time)])

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every self-attention."""
        return tuple(f"{path}.to_q.1.weight" for path in self.site_modules(module).values())
