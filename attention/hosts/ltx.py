"""LTX-Video and LTX-2.

Sequence: main grid (frames, rows, columns), then the guide frames that nodes append to the latent, which are global
tokens; of a guide in low resolution only the tokens it has are left. LTX-2's attention to its sound, within it and from
it, is never touched, and neither is that to the text: sites are told by their modules.

Guides of another strength than 1 make ComfyUI split self-attention into calls with a mask each, which are declined.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout, grid_segment
from .base import Host, ModelCall, Site, WeightTarget, grid_of, missing_structure, numbered_sites, with_biases

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
STRUCTURE = (
    "patchify_proj",
    "adaln_single",
    "vae_scale_factors",
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn1.q_norm",
    "transformer_blocks.0.attn2.to_k",
    "transformer_blocks.0.scale_shift_table",
    "proj_out",
)


class LTXHost(Host):
    """LTX: 28 blocks in the 2B model, 48 in 13B and LTX-2; head dimension 64 or 128."""

    name = "ltx"
    title = "LTX-Video"
    default_text_tokens = 0  # text is in cross-attention

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        sizes = module.num_attention_heads, module.attention_head_dim
        return numbered_sites("blocks", len(module.transformer_blocks), *sizes)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"transformer_blocks.{i}.attn1" for i in range(len(module.transformer_blocks))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """Of video and sound, the video comes first."""
        latent = call.argument(0, "x")
        latent = latent[0] if isinstance(latent, list) else latent
        if getattr(latent, "ndim", 0) != 5:
            return Reason("arguments", f"{self.title} was called without the 5-D latent that tells its token grid")
        frames, rows, columns = grid_of(latent, (1, 1, 1))
        keyframes, mask = call.argument(6, "keyframe_idxs"), call.kwargs.get("denoise_mask")
        num_guide_tokens = 0 if keyframes is None else keyframes.shape[2]
        guides, rest = divmod(num_guide_tokens, rows * columns)
        if rest or guides >= frames:
            return Reason("guides", "the guides are no whole frames at the end of the latent")
        if guides and mask is not None:
            is_left = ~(mask[:1] < 0).any(dim=1).expand(1, frames, rows, columns)
            if not is_left[:, : frames - guides].all():
                return Reason("guides", "a node removes tokens from the video itself")
            num_guide_tokens = int(is_left[:, frames - guides :].sum())
        main = grid_segment("main", frames - guides, rows, columns)
        is_whole = num_guide_tokens == guides * rows * columns and guides > 0  # some of its tokens may be left out
        place = (guides, rows, columns) if is_whole else None
        return TokenLayout.of((main, Segment("reference", num_guide_tokens, place=place)))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Text is not part of the sequence."""
        in_time, rows, columns = module.vae_scale_factors
        latent_frames = (max(frames, 1) - 1) // in_time + 1
        return TokenLayout.of([grid_segment("main", latent_frames, height // rows, width // columns)])

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the self-attention projections, weights and biases; diffusers names them alike."""
        shape = module.inner_dim, module.inner_dim
        names = [f"{path}.{part}.weight" for path in self.site_modules(module).values() for part in PROJECTIONS]
        return with_biases({name: WeightTarget(name, 0, shape) for name in names})

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {path: site for site, path in self.site_modules(module).items()}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every self-attention."""
        return tuple(f"{path}.q_norm.weight" for path in self.site_modules(module).values())
