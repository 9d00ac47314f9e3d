"""JoyImage-Edit.

Sequence: main grid, then one run of tokens per reference latent, then text; references are global like the text. No
call gets a mask.
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
    reference_segments,
    site_of_block,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4
STRUCTURE = (
    "img_in",
    "condition_embedder.text_embedder",
    "double_blocks.0.attn.img_attn_qkv",
    "double_blocks.0.attn.txt_attn_qkv",
    "rope_dim_list",
    "norm_out",
    "proj_out",
)


class JoyImageHost(Host):
    """JoyImage: double blocks only, head dimension 128."""

    name = "joyimage"
    title = "JoyImage"
    default_text_tokens = 128  # prompts are not padded; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        """Rotary positions take all of a head's dimensions."""
        heads = module.double_blocks[0].attn.num_attention_heads
        return numbered_sites("blocks", len(module.double_blocks), heads, sum(module.rope_dim_list))

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "hidden_states"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (5,), text)
        if problem:
            return problem
        patch = tuple(call.module.patch_size)
        references = reference_segments(call.argument(3, "ref_latents"), patch)
        return TokenLayout.of((main_segment(latent, patch), *references, Segment("text", text.shape[1])))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        side, latent_frames = PIXELS_PER_LATENT * module.patch_size[1], (frames - 1) // FRAMES_PER_LATENT + 1
        main = planned_main(width, height, side, latent_frames)
        return TokenLayout.of((main, Segment("text", text_tokens)))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the image stream."""
        return tuple(f"double_blocks.{i}.attn.img_attn_q_norm.weight" for i in range(len(module.double_blocks)))

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "blocks"})
