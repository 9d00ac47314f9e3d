"""FLUX.2 (dev, Klein).

Sequence: text, main grid, then one run of tokens per reference latent, whatever places ("index", "offset") the
references are given. A latent cell is 16 x 16 pixels and one token. References are global tokens.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    ModelCall,
    WeightTarget,
    main_segment,
    missing_structure,
    planned_main,
    reference_segments,
    wrong_inputs,
)
from .double_single import DoubleSingleHost, double_targets

PIXELS_PER_LATENT = 16
STRUCTURE = (
    "img_in",
    "txt_in",
    "time_in",
    "pe_embedder",
    "final_layer",
    "double_stream_modulation_img",
    "single_stream_modulation",
    "double_blocks.0.img_attn.qkv",
    "single_blocks.0.linear1",
)


class Flux2Host(DoubleSingleHost):
    """FLUX.2: 8 double and 48 single blocks in dev, head dimension 128; all blocks share their modulation."""

    name = "flux2"
    title = "FLUX.2"
    default_text_tokens = 512  # ComfyUI pads shorter prompts to this many tokens

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem:
            return problem
        patch = (call.module.patch_size,) * 2
        references = reference_segments(call.argument(5, "ref_latents"), patch)
        return TokenLayout.of((Segment("text", text.shape[1]), main_segment(latent, patch), *references))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """FLUX.2 makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size)
        return TokenLayout.of((Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image-stream projections; single blocks keep q, k, v and their MLP in one, without biases."""
        targets = double_targets(module)
        for i, block in enumerate(module.single_blocks):
            name, shape = f"single_transformer_blocks.{i}.attn", (3 * module.hidden_size, module.hidden_size)
            shape = (shape[0] + block.mlp_hidden_dim_first, shape[1])
            targets[f"{name}.to_qkv_mlp_proj.weight"] = WeightTarget(f"single_blocks.{i}.linear1.weight", 0, shape)
        return targets
