"""Krea 2.

Sequence: text, main grid, then one run of tokens per reference latent, which are global. A latent with frames runs
frame by frame, as a batch. The blocks that fuse the text run before there is a block index, so they are no sites. No
call gets a mask.
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    Host,
    ModelCall,
    Site,
    WeightTarget,
    main_segment,
    missing_structure,
    numbered_sites,
    planned_main,
    reference_segments,
    rows_of,
    site_of_block,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
STRUCTURE = (
    "first",
    "tmlp",
    "txtfusion.layerwise_blocks",
    "txtmlp",
    "last",
    "blocks.0.attn.wq",
    "blocks.0.attn.qknorm",
)


class Krea2Host(Host):
    """Krea 2: 28 blocks, head dimension 128; four query heads share keys and values, which the model repeats."""

    name = "krea2"
    title = "Krea 2"
    default_text_tokens = 128  # prompts are not padded; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        return numbered_sites("blocks", len(module.blocks), module.heads, module.blocks[0].attn.headdim)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """The model drops references unless it is told how to place them."""
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4, 5), text)
        if problem:
            return problem
        patch = (call.module.patch,) * 2
        placed = call.kwargs.get("ref_latents_method", call.module.default_ref_method)
        references = reference_segments(call.argument(4, "ref_latents") if placed is not None else (), patch)
        return TokenLayout.of((Segment("text", text.shape[1]), main_segment(latent, patch), *references))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Krea 2 makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch)
        return TokenLayout.of((Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the projections, which have no biases.

        Source: `krea2_to_diffusers` of ComfyUI 0.30.
        """
        targets: dict[str, WeightTarget] = {}
        for i, block in enumerate(module.blocks):
            name, own, attention = f"transformer_blocks.{i}.attn", f"blocks.{i}.attn", block.attn
            width, narrow = attention.heads * attention.headdim, attention.kvheads * attention.headdim
            parts = (("to_q", "wq", width), ("to_k", "wk", narrow), ("to_v", "wv", narrow), ("to_out.0", "wo", width))
            for part, key, rows in parts:
                targets |= rows_of(name, (part,), f"{own}.{key}", (rows,), width)
        return targets

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {f"transformer_blocks.{i}.attn": f"blocks.{i}" for i in range(len(module.blocks))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every block."""
        return tuple(f"blocks.{i}.attn.qknorm.qnorm.scale" for i in range(len(module.blocks)))

    def site_weights(self, module: Any) -> dict[str, tuple[str, ...]]:
        return {f"blocks.{i}": (f"blocks.{i}.attn",) for i in range(len(module.blocks))}

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"single": "blocks"})
