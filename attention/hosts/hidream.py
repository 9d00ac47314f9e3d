"""HiDream-I1.

Sequence: main grid, then text: that of T5, that of the last layer of Llama and that of the layer that belongs to the
block. HiDream-E1 puts the picture to edit beside the latent, so that the rows of the two alternate; that is declined.
"""

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
    with_biases,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
STRUCTURE = (
    "x_embedder",
    "t_embedder",
    "p_embedder",
    "caption_projection.0.linear",
    "double_stream_blocks.0.block.attn1.to_q_t",
    "single_stream_blocks.0.block.attn1.to_q",
    "llama_layers",
    "final_layer",
)


class HiDreamHost(Host):
    """HiDream-I1: 16 double and 32 single blocks, head dimension 128."""

    name = "hidream"
    title = "HiDream-I1"
    default_text_tokens = 384  # 128 of T5 and twice 128 of Llama

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        sizes = module.num_attention_heads, module.attention_head_dim
        double = numbered_sites("double", len(module.double_stream_blocks), *sizes)
        return double + numbered_sites("single", len(module.single_stream_blocks), *sizes)

    def site_modules(self, module: Any) -> dict[str, str]:
        kinds = {"double": module.double_stream_blocks, "single": module.single_stream_blocks}
        return {
            f"{kind}.{i}": f"{kind}_stream_blocks.{i}.block.attn1"
            for kind, blocks in kinds.items()
            for i in range(len(blocks))
        }

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text, llama = (
            call.argument(0, "x"),
            call.argument(3, "context"),
            call.argument(4, "encoder_hidden_states_llama3"),
        )
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem is not None or getattr(llama, "ndim", 0) != 4:
            return problem or Reason("arguments", f"{self.title} was called without the layers of Llama")
        if call.argument(5, "image_cond") is not None:
            return Reason("references", "the picture to edit lies beside the latent, so no grid holds the latent alone")
        patch = call.module.patch_size
        return TokenLayout.of(
            (main_segment(latent, (patch, patch)), Segment("text", text.shape[1] + 2 * llama.shape[2]))
        )

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """HiDream makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size)
        return TokenLayout.of((main, Segment("text", text_tokens)))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image-stream projections, weights and biases; diffusers names them alike."""
        width = module.num_attention_heads * module.attention_head_dim
        names = [f"{path}.{part}.weight" for path in self.site_modules(module).values() for part in PROJECTIONS]
        return with_biases({name: WeightTarget(name, 0, (width, width)) for name in names})

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {path: site for site, path in self.site_modules(module).items()}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the image stream."""
        return tuple(f"{path}.q_rms_norm.weight" for path in self.site_modules(module).values())
