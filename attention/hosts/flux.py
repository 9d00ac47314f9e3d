"""FLUX.1 (dev, schnell, Kontext, Fill and other models of that shape).

Sequence: text, main grid, then one run of tokens per reference latent. References are global tokens: every image token
sees all of them, because an edit copies from anywhere in its reference.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    ModelCall,
    main_segment,
    missing_attributes,
    missing_structure,
    planned_main,
    reference_segments,
    wrong_inputs,
)
from .double_single import DoubleSingleHost

PIXELS_PER_LATENT = 8
STRUCTURE = (
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "pe_embedder",
    "final_layer",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.qkv",
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
)


class FluxHost(DoubleSingleHost):
    """FLUX.1: 19 double and 38 single blocks in the released models, head dimension 128."""

    name = "flux"
    title = "FLUX.1"
    default_text_tokens = 256  # ComfyUI pads T5 prompts to this many tokens; longer prompts grow

    def mismatch(self, module: Any) -> Reason | None:
        missing = missing_structure(self.title, module, STRUCTURE)
        if missing:
            return missing
        if not isinstance(module.patch_size, int):
            return Reason("structure", f"{self.title} models have one patch size for height and width")
        if missing_attributes(module, ("double_stream_modulation_img",)) == ():
            return Reason(
                "structure", f"{self.title} models modulate each block, this one shares a modulation (FLUX.2)"
            )
        return None

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem:
            return problem
        patch = (call.module.patch_size,) * 2
        references = reference_segments(call.argument(5, "ref_latents"), patch)
        return TokenLayout.of((Segment("text", text.shape[1]), main_segment(latent, patch), *references))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """FLUX makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size)
        return TokenLayout.of((Segment("text", text_tokens), main))
