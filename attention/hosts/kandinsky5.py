"""Kandinsky 5 (video and image).

Sequence: the main grid alone. Text comes in through cross-attention, which is left alone like the text's own blocks:
a site is the one module of a visual block that attends to the picture itself.
"""

from typing import Any

from ..layout import Reason, TokenLayout
from .base import (
    Host,
    ModelCall,
    Site,
    WeightTarget,
    main_segment,
    missing_structure,
    numbered_sites,
    planned_main,
    rows_of,
    with_biases,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4
PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")
STRUCTURE = (
    "visual_embeddings.in_layer",
    "text_embeddings",
    "text_transformer_blocks",
    "visual_transformer_blocks.0.self_attention.to_query",
    "visual_transformer_blocks.0.cross_attention",
    "rope_embedder_3d",
    "out_layer",
)


class Kandinsky5Host(Host):
    """Kandinsky 5: 32 visual blocks in lite (head dimension 64), 60 in pro (128)."""

    name = "kandinsky5"
    title = "Kandinsky 5"
    default_text_tokens = 0  # text is no part of the sequence

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.visual_transformer_blocks[0].self_attention
        sizes = attention.num_heads, attention.head_dim
        return numbered_sites("blocks", len(module.visual_transformer_blocks), *sizes)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """A 4-D latent is one frame."""
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4, 5), text)
        if problem:
            return problem
        patch = tuple(call.module.patch_size)
        return TokenLayout.of([main_segment(latent, patch if latent.ndim == 5 else patch[1:])])

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Text is no part of it."""
        side, latent_frames = PIXELS_PER_LATENT * module.patch_size[1], (frames - 1) // FRAMES_PER_LATENT + 1
        return TokenLayout.of([planned_main(width, height, side, latent_frames)])

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the projections; diffusers kept the authors' names, as ComfyUI did."""
        targets: dict[str, WeightTarget] = {}
        for name in self.diffusers_sites(module):
            for part in PROJECTIONS:
                targets |= rows_of(name, (part,), f"{name}.{part}", (module.model_dim,), module.model_dim)
        return with_biases(targets)

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {path: site for site, path in self.site_modules(module).items()}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every site."""
        return tuple(f"{path}.query_norm.weight" for path in self.site_modules(module).values())

    def site_modules(self, module: Any) -> dict[str, str]:
        """The block index names self- and cross-attention alike."""
        count = len(module.visual_transformer_blocks)
        return {f"blocks.{i}": f"visual_transformer_blocks.{i}.self_attention" for i in range(count)}
