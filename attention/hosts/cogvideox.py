"""CogVideoX 1.0 and 1.5.

Sequence: text, main grid (frames, rows, columns). A token of 1.5 spans two latent frames. Nothing in the transformer
options names the block, which issues its one attention call itself.
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
FRAMES_PER_LATENT = 4  # after the first, which stands for itself
PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "attn_out"}
STRUCTURE = (
    "patch_embed.text_proj",
    "time_embedding_linear_1",
    "temporal_compression_ratio",
    "blocks.0.norm1.linear",
    "blocks.0.attn_out",
    "blocks.0.norm_q",
    "norm_out.linear",
    "proj_out",
)


class CogVideoXHost(Host):
    """CogVideoX: 30 blocks in the 2B model, 42 in 5B; head dimension 64."""

    name = "cogvideox"
    title = "CogVideoX"
    default_text_tokens = 226  # ComfyUI pads T5 prompts to this many tokens; longer prompts grow

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        return numbered_sites("blocks", len(module.blocks), module.num_attention_heads, module.attention_head_dim)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"blocks.{i}" for i in range(len(module.blocks))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (5,), text)
        return problem or TokenLayout.of((Segment("text", text.shape[1]), main_segment(latent, _patch(call.module))))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        in_time, side, _ = _patch(module)
        latent_frames = (max(frames, 1) - 1) // FRAMES_PER_LATENT + 1
        main = planned_main(width, height, PIXELS_PER_LATENT * side, -(-latent_frames // in_time))
        return TokenLayout.of((Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the projections, weights and biases, which text and video share.

        Source: key names of diffusers 0.35, `CogVideoXTransformer3DModel`.
        """
        return with_biases(
            {
                f"transformer_blocks.{i}.attn1.{theirs}.weight": WeightTarget(
                    f"blocks.{i}.{ours}.weight", 0, (module.dim, module.dim)
                )
                for i in range(len(module.blocks))
                for theirs, ours in PROJECTIONS.items()
            }
        )

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {f"transformer_blocks.{i}.attn1": f"blocks.{i}" for i in range(len(module.blocks))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every block."""
        return tuple(f"blocks.{i}.norm_q.weight" for i in range(len(module.blocks)))

    def site_weights(self, module: Any) -> dict[str, tuple[str, ...]]:
        """A block holds them itself."""
        parts = (*PROJECTIONS.values(), "norm_q", "norm_k")
        return {f"blocks.{i}": tuple(f"blocks.{i}.{part}" for part in parts) for i in range(len(module.blocks))}


def _patch(module: Any) -> tuple[int, int, int]:
    return module.patch_size_t or 1, module.patch_size, module.patch_size
