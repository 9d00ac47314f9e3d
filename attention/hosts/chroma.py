"""Chroma, and Chroma Radiance, which works on pixels.

Sequence: text, main grid. No references. Blocks that a Chroma model was told to skip issue no call, so their sites
never run.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import Host, ModelCall, main_segment, missing_attributes, missing_structure, planned_main, wrong_inputs
from .double_single import DoubleSingleHost

PIXELS_PER_LATENT = 8
STRUCTURE = (
    "txt_in",
    "distilled_guidance_layer",
    "pe_embedder",
    "double_blocks.0.img_attn.qkv",
    "single_blocks.0.linear1",
)


class ChromaHost(DoubleSingleHost):
    """Chroma: 19 double and 38 single blocks, head dimension 128; all modulations come from one small network.

    It has no diffusers names here: CLEAR's files for FLUX.1 would fit its shapes, and are not for its weights.
    """

    name = "chroma"
    title = "Chroma"
    default_text_tokens = 128  # prompts are not padded; about 90 words
    diffusers_targets = Host.diffusers_targets
    diffusers_sites = Host.diffusers_sites

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem:
            return problem
        main = main_segment(latent, (call.module.patch_size,) * 2)
        return TokenLayout.of((Segment("text", text.shape[1]), main))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Chroma makes pictures, so `frames` is not used."""
        works_on_pixels = not missing_attributes(module, ("img_in_patch",))
        main = planned_main(width, height, module.patch_size * (1 if works_on_pixels else PIXELS_PER_LATENT))
        return TokenLayout.of((Segment("text", text_tokens), main))
