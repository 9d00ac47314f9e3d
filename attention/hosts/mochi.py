"""Mochi 1.

Sequence: main grid (frames, rows, columns), then the tokens of the text that are no padding.
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
    rows_of,
    with_biases,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 6  # after the first, which stands for itself
TEXT_TOKENS = 256  # what the model crops text to where the call names no number
STRUCTURE = (
    "x_embedder.proj",
    "t5_y_embedder",
    "t5_yproj",
    "pos_frequencies",
    "blocks.0.attn.qkv_x",
    "blocks.0.attn.qkv_y",
    "blocks.0.attn.proj_x",
    "final_layer",
)


class MochiHost(Host):
    """Mochi 1: 48 blocks, head dimension 128."""

    name = "mochi"
    title = "Mochi"
    default_text_tokens = TEXT_TOKENS
    wrapped = "apply_model"

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        return numbered_sites("blocks", len(module.blocks), module.num_heads, module.head_dim)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"blocks.{i}.attn" for i in range(len(module.blocks))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(3, "c_crossattn")
        problem = wrong_inputs(self.title, latent, (5,), text)
        if problem is not None:
            return problem
        patch, shown = call.module.patch_size, call.kwargs.get("num_tokens", TEXT_TOKENS)
        main = main_segment(latent, (1, patch, patch))
        return TokenLayout.of((main, Segment("text", min(text.shape[1], shown))))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        latent_frames = (max(frames, 1) - 1) // FRAMES_PER_LATENT + 1
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size, latent_frames)
        return TokenLayout.of((main, Segment("text", text_tokens)))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the projections of the video; q, k and v are rows of one parameter without a bias, in this order.

        Source: key names of diffusers 0.35, `MochiTransformer3DModel`.
        """
        width, targets = module.hidden_size_x, {}
        for i in range(len(module.blocks)):
            ours, theirs = f"blocks.{i}.attn", f"transformer_blocks.{i}.attn1"
            targets |= rows_of(theirs, ("to_q", "to_k", "to_v"), f"{ours}.qkv_x", (width,) * 3, width)
            targets |= with_biases(rows_of(theirs, ("to_out.0",), f"{ours}.proj_x", (width,), width))
        return targets

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {f"transformer_blocks.{i}.attn1": f"blocks.{i}" for i in range(len(module.blocks))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the video."""
        return tuple(f"blocks.{i}.attn.q_norm_x.weight" for i in range(len(module.blocks)))
