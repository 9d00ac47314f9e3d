"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered.

Sequence: text, main grid (its frames are the layers of a layered picture), then one run of tokens per reference
latent, which are global. A call gets a mask only where part of a prompt is padding, which ComfyUI's own encoder does
not make; such a call is declined.
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
    with_biases,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
STRUCTURE = (
    "img_in",
    "txt_in",
    "txt_norm",
    "pe_embedder",
    "time_text_embed.time_proj",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.img_mlp.net",
    "norm_out",
    "proj_out",
)


class QwenImageHost(Host):
    """Qwen-Image: 60 blocks, head dimension 128."""

    name = "qwen_image"
    title = "Qwen-Image"
    default_text_tokens = 128  # prompts are not padded; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        block = module.transformer_blocks[0]
        sizes = block.num_attention_heads, block.attention_head_dim
        return numbered_sites("blocks", len(module.transformer_blocks), *sizes)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (5,), text)
        if problem:
            return problem
        patch = (1, call.module.patch_size, call.module.patch_size)
        references = reference_segments(call.argument(4, "ref_latents"), patch)
        return TokenLayout.of((Segment("text", text.shape[1]), main_segment(latent, patch), *references))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """`frames` counts the layers of a layered picture, its whole one included."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size, frames)
        return TokenLayout.of((Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image stream's projections; ComfyUI kept the diffusers names."""
        targets: dict[str, WeightTarget] = {}
        for i, block in enumerate(module.transformer_blocks):
            name = f"transformer_blocks.{i}.attn"
            for part in PROJECTIONS:
                targets |= rows_of(name, (part,), f"{name}.{part}", (block.dim,), block.dim)
        return with_biases(targets)

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {f"transformer_blocks.{i}.attn": f"blocks.{i}" for i in range(len(module.transformer_blocks))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the image stream."""
        return tuple(f"transformer_blocks.{i}.attn.norm_q.weight" for i in range(len(module.transformer_blocks)))

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "blocks"})
