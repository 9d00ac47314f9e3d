"""Cosmos Predict2, and Anima which has its shape.

Sequence: main grid (frames, rows, columns) and nothing else. Text is seen in cross-attention, and Anima pads it to 512
tokens, as many as a small picture has; sites are told by their modules.
"""

from typing import Any

from ..layout import Reason, TokenLayout
from .base import Host, ModelCall, Site, WeightTarget, main_segment, missing_structure, numbered_sites, planned_main

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4  # after the first, which stands for itself
PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "output_proj"}
STRUCTURE = (
    "x_embedder",
    "t_embedder",
    "t_embedding_norm",
    "patch_temporal",
    "blocks.0.self_attn.q_proj",
    "blocks.0.self_attn.q_norm",
    "blocks.0.cross_attn.k_proj",
    "blocks.0.adaln_modulation_self_attn",
    "final_layer",
)


class CosmosPredict2Host(Host):
    """Cosmos Predict2: 28 blocks in the 2B model and in Anima, 36 in 14B; head dimension 128."""

    name = "cosmos_predict2"
    title = "Cosmos Predict2"
    default_text_tokens = 0  # text is in cross-attention

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        return numbered_sites("blocks", len(module.blocks), module.num_heads, module.model_channels // module.num_heads)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"blocks.{i}.self_attn" for i in range(len(module.blocks))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, module = call.argument(0, "x"), call.module
        if getattr(latent, "ndim", 0) != 5:
            return Reason("arguments", f"{self.title} was called without the 5-D latent that tells its token grid")
        return TokenLayout.of(
            [main_segment(latent, (module.patch_temporal, module.patch_spatial, module.patch_spatial))]
        )

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Text is not part of the sequence."""
        latent_frames = (max(frames, 1) - 1) // FRAMES_PER_LATENT + 1
        in_time = -(-latent_frames // module.patch_temporal)
        return TokenLayout.of([planned_main(width, height, PIXELS_PER_LATENT * module.patch_spatial, in_time)])

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the self-attention projections, which have no biases.

        Source: key names of diffusers 0.35, `CosmosTransformer3DModel`.
        """
        shape = module.model_channels, module.model_channels
        return {
            f"transformer_blocks.{i}.attn1.{theirs}.weight": WeightTarget(
                f"blocks.{i}.self_attn.{ours}.weight", 0, shape
            )
            for i in range(len(module.blocks))
            for theirs, ours in PROJECTIONS.items()
        }

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {f"transformer_blocks.{i}.attn1": f"blocks.{i}" for i in range(len(module.blocks))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every self-attention."""
        return tuple(f"{path}.q_norm.weight" for path in self.site_modules(module).values())
