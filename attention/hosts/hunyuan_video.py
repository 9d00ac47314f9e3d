"""HunyuanVideo 1.0 and 1.5, and HunyuanImage 2.1 with its refiner.

Sequence: what conditions (vision features of a start picture, text, glyphs; global), reference frames (global), main
grid. The token refiner of the text runs before there is a block index, so it is no site. A call gets a mask only
where part of a prompt is padding, which ComfyUI's own encoders do not make; such a call is declined.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout, reference_segment
from .base import ModelCall, grid_of, main_segment, missing_structure, planned_main, wrong_inputs
from .double_single import DoubleSingleHost

FRAMES_PER_LATENT = 4
PIXELS_PER_TOKEN = {(1, 1): 32, (1, 1, 1): 16, (1, 2, 2): 16}  # by patch: HunyuanImage, 1.5, 1.0
STRUCTURE = (
    "img_in.proj",
    "txt_in.individual_token_refiner",
    "time_in",
    "pe_embedder",
    "final_layer",
    "byt5_in",
    "vision_in",
    "double_blocks.0.img_attn.qkv",
)


class HunyuanVideoHost(DoubleSingleHost):
    """HunyuanVideo: 20 double and 40 single blocks in 1.0, 54 double ones in 1.5, head dimension 128."""

    name = "hunyuan_video"
    title = "HunyuanVideo"
    default_text_tokens = 128  # prompts are not padded; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        missing = missing_structure(self.title, module, STRUCTURE)
        if missing:
            return missing
        if tuple(module.patch_size) not in PIXELS_PER_TOKEN:
            known = ", ".join(map(str, PIXELS_PER_TOKEN))
            return Reason("structure", f"{self.title} models have patch size {known}, this one {module.patch_size}")
        return None

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        module, latent, text = call.module, call.argument(0, "x"), call.argument(2, "context")
        patch = tuple(module.patch_size)
        problem = wrong_inputs(self.title, latent, (len(patch) + 2,), text)
        if problem:
            return problem
        glyphs, vision = call.argument(4, "txt_byt5"), call.argument(5, "clip_fea")
        reference = call.argument(9, "ref_latent")
        words = [Segment("text", text.shape[1])]
        if glyphs is not None and module.byt5_in is not None:
            before = module.cond_type_embedding is not None
            words.insert(0 if before else 1, Segment("text", glyphs.shape[1]))
        segments = [] if vision is None else [Segment("reference", vision.shape[1])]
        segments += words
        if reference is not None:
            segments.append(reference_segment(grid_of(reference, patch)))
        return TokenLayout.of([*segments, main_segment(latent, patch)])

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """HunyuanImage makes pictures and does not use `frames`."""
        patch = tuple(module.patch_size)
        latent_frames = (frames - 1) // FRAMES_PER_LATENT + 1 if len(patch) == 3 else 1
        main = planned_main(width, height, PIXELS_PER_TOKEN[patch], latent_frames)
        return TokenLayout.of((Segment("text", text_tokens), main))
