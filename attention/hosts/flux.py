"""FLUX.1 (dev, schnell, Kontext, Fill and other models of that shape).

Sequence: text, main grid, then one run of tokens per reference latent. References are global tokens: every image token
sees all of them, because an edit copies from anywhere in its reference.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..layout import Reason, Segment, TokenLayout, grid_segment
from .base import ModelCall, Site, WeightTarget, missing_attributes

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


class FluxHost:
    """FLUX.1: 19 double and 38 single blocks in the released models, head dimension 128."""

    name = "flux"
    title = "FLUX.1"
    default_text_tokens = 256  # ComfyUI pads T5 prompts to this many tokens; longer prompts grow

    def mismatch(self, module: Any) -> Reason | None:
        """See `Host.mismatch`."""
        missing = missing_attributes(module, STRUCTURE)
        if missing:
            return Reason("structure", f"{self.title} models have {', '.join(missing)}")
        if not isinstance(module.patch_size, int):
            return Reason("structure", f"{self.title} models have one patch size for height and width")
        if missing_attributes(module, ("double_stream_modulation_img",)) == ():
            return Reason(
                "structure", f"{self.title} models modulate each block, this one shares a modulation (FLUX.2)"
            )
        return None

    def sites(self, module: Any) -> tuple[Site, ...]:
        """See `Host.sites`."""
        heads, head_dim = module.num_heads, module.hidden_size // module.num_heads
        ids = [f"double.{i}" for i in range(len(module.double_blocks))]
        ids += [f"single.{i}" for i in range(len(module.single_blocks))]
        return tuple(Site(site, heads, head_dim) for site in ids)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """See `Host.layout`."""
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        references = call.argument(5, "ref_latents") or ()
        if getattr(latent, "ndim", 0) != 4 or getattr(text, "ndim", 0) != 3:
            return Reason("arguments", "FLUX was called without the 4-D latent and 3-D text that tell its token grid")
        patch = call.module.patch_size
        rows, columns = _tokens(latent, patch)
        segments = [Segment("text", text.shape[1]), grid_segment("main", 1, rows, columns)]
        segments += [Segment("reference", math.prod(_tokens(reference, patch))) for reference in references]
        return TokenLayout.of(segments)

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """See `Host.planned_layout`; FLUX makes pictures, so `frames` is not used."""
        side = PIXELS_PER_LATENT * module.patch_size
        main = grid_segment("main", 1, math.ceil(height / side), math.ceil(width / side))
        return TokenLayout.of((Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image-stream projections that CLEAR trains, weights and biases.

        q, k and v are rows of one fused parameter in ComfyUI, in this order; the rest of a single block's `linear1` is
        its MLP.

        Source: key names of diffusers 0.31, and `flux_to_diffusers` of ComfyUI 0.30.
        """
        width = module.hidden_size
        targets = {}
        for end, shape in (("weight", (width, width)), ("bias", (width,))):
            for i in range(len(module.double_blocks)):
                name, block = f"transformer_blocks.{i}.attn", f"double_blocks.{i}.img_attn"
                for row, part in enumerate(("to_q", "to_k", "to_v")):
                    targets[f"{name}.{part}.{end}"] = WeightTarget(f"{block}.qkv.{end}", row * width, shape)
                targets[f"{name}.to_out.0.{end}"] = WeightTarget(f"{block}.proj.{end}", 0, shape)
            for i in range(len(module.single_blocks)):
                name, block = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
                for row, part in enumerate(("to_q", "to_k", "to_v")):
                    targets[f"{name}.{part}.{end}"] = WeightTarget(f"{block}.linear1.{end}", row * width, shape)
        return targets

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        """See `Host.diffusers_sites`."""
        sites = {f"transformer_blocks.{i}.attn": f"double.{i}" for i in range(len(module.double_blocks))}
        single = {f"single_transformer_blocks.{i}.attn": f"single.{i}" for i in range(len(module.single_blocks))}
        return sites | single

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """See `Host.norm_parameters`: the query norms of every block."""
        double = [f"double_blocks.{i}.img_attn.norm.query_norm" for i in range(len(module.double_blocks))]
        single = [f"single_blocks.{i}.norm.query_norm" for i in range(len(module.single_blocks))]
        return tuple(f"{name}.weight" for name in double + single)

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        """See `Host.site_of`."""
        kind, index = options.get("block_type"), options.get("block_index")
        if kind not in ("double", "single") or index is None:
            return None
        return f"{kind}.{index}"


def _tokens(latent: Any, patch: int) -> tuple[int, int]:
    """Return (rows, columns) of tokens; ComfyUI pads latents that the patch does not divide."""
    return math.ceil(latent.shape[-2] / patch), math.ceil(latent.shape[-1] / patch)
