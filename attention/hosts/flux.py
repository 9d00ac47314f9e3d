"""FLUX.1 (dev, schnell, Kontext, Fill and other models of that shape).

Sequence: text, main grid, then one run of tokens per reference latent. References are global tokens: every image token
sees all of them, because an edit copies from anywhere in its reference.
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    Host,
    ModelCall,
    Site,
    WeightTarget,
    double_single_diffusers_sites,
    double_single_norms,
    double_single_sites,
    double_single_targets,
    double_single_weights,
    main_segment,
    missing_attributes,
    missing_structure,
    planned_main,
    reference_segments,
    site_of_block,
    with_biases,
    wrong_inputs,
)

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


class FluxHost(Host):
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

    def sites(self, module: Any) -> tuple[Site, ...]:
        return double_single_sites(module)

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

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image-stream projections that CLEAR trains, weights and biases."""
        return with_biases(double_single_targets(module))

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return double_single_diffusers_sites(module)

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every block."""
        return double_single_norms(module)

    def site_weights(self, module: Any) -> dict[str, tuple[str, ...]]:
        return double_single_weights(module)

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "double", "single": "single"})
