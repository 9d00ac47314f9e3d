"""Mage-Flow, which has Qwen-Image's blocks.

Sequence: text, main grid, then one run of tokens per reference latent, which are global. A latent cell is 16 x 16
pixels and one token. A call gets a mask only where part of a prompt is padding; such a call is declined.
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    Host,
    ModelCall,
    Site,
    main_segment,
    missing_attributes,
    missing_structure,
    numbered_sites,
    planned_main,
    reference_segments,
    site_of_block,
    wrong_inputs,
)

PIXELS_PER_LATENT = 16
STRUCTURE = (
    "img_in",
    "txt_in",
    "txt_norm",
    "pe_embedder",
    "time_text_embed.timestep_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.img_mlp.net",
    "norm_out",
    "proj_out",
)


class MageFlowHost(Host):
    """Mage-Flow: 12 blocks, head dimension 128."""

    name = "mage_flow"
    title = "Mage-Flow"
    default_text_tokens = 128  # prompts are not padded; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        missing = missing_structure(self.title, module, STRUCTURE)
        if missing is None and not missing_attributes(module, ("time_text_embed.time_proj",)):
            return Reason("structure", f"{self.title} models embed the time by themselves, as Qwen-Image does not")
        return missing

    def sites(self, module: Any) -> tuple[Site, ...]:
        block = module.transformer_blocks[0]
        sizes = block.num_attention_heads, block.attention_head_dim
        return numbered_sites("blocks", len(module.transformer_blocks), *sizes)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem:
            return problem
        references = reference_segments(call.argument(4, "ref_latents"), (1, 1))
        return TokenLayout.of((Segment("text", text.shape[1]), main_segment(latent, (1, 1)), *references))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Mage-Flow makes pictures, so `frames` is not used."""
        return TokenLayout.of((Segment("text", text_tokens), planned_main(width, height, PIXELS_PER_LATENT)))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the image stream."""
        return tuple(f"transformer_blocks.{i}.attn.norm_q.weight" for i in range(len(module.transformer_blocks)))

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "blocks"})
