"""Lens.

Sequence: main grid, then text. A latent cell is 16 x 16 pixels and one token. Every call gets a mask over its keys;
where no part of the prompt is padding it hides nothing, and the call runs. Otherwise it is declined.
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    Host,
    ModelCall,
    Site,
    main_segment,
    missing_structure,
    numbered_sites,
    planned_main,
    site_of_block,
    wrong_inputs,
)

PIXELS_PER_LATENT = 16
STRUCTURE = (
    "img_in",
    "txt_in",
    "txt_norm",
    "pos_embed",
    "time_text_embed",
    "transformer_blocks.0.attn.img_qkv",
    "transformer_blocks.0.attn.txt_qkv",
    "transformer_blocks.0.img_mlp.w1",
    "norm_out",
    "proj_out",
)


class LensHost(Host):
    """Lens: 48 blocks, head dimension 64."""

    name = "lens"
    title = "Lens"
    default_text_tokens = 128  # prompts are not padded; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.transformer_blocks[0].attn
        return numbered_sites("blocks", len(module.transformer_blocks), attention.heads, attention.dim_head)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4,), text)
        return problem or TokenLayout.of((main_segment(latent, (1, 1)), Segment("text", text.shape[1])))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Lens makes pictures, so `frames` is not used."""
        return TokenLayout.of((planned_main(width, height, PIXELS_PER_LATENT), Segment("text", text_tokens)))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the image stream."""
        return tuple(f"transformer_blocks.{i}.attn.norm_q.weight" for i in range(len(module.transformer_blocks)))

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "blocks"})
