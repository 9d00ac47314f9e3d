"""Stable Diffusion 3 and 3.5.

Sequence: text (after registers, where a model has any), main grid. In the first blocks of SD3.5 medium the picture
attends to itself once more, without text: these calls are the sites `image.N`. One block issues both calls, so the
number of tokens tells them apart.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import (
    Host,
    ModelCall,
    Site,
    WeightTarget,
    main_segment,
    missing_attributes,
    missing_structure,
    planned_main,
    rows_of,
    with_biases,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
PARTS = ("to_q", "to_k", "to_v")
STRUCTURE = (
    "x_embedder.proj",
    "t_embedder",
    "context_embedder",
    "joint_blocks.0.context_block.attn.qkv",
    "joint_blocks.0.x_block.attn.qkv",
    "joint_blocks.0.x_block.attn.proj",
    "final_layer",
)


class SD3Host(Host):
    """SD3: 24 blocks in the medium models, 38 in large; head dimension 64."""

    name = "sd3"
    title = "Stable Diffusion 3"
    default_text_tokens = 154  # 77 of CLIP and 77 of T5; longer prompts grow
    wrapped = "apply_model"

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        """`joint.N`, and `image.N` after it."""
        heads, head_dim = module.num_heads, module.hidden_size // module.num_heads
        return tuple(Site(site, heads, head_dim) for site, _, _ in _calls(module))

    def site_modules(self, module: Any) -> dict[str, str]:
        """A block issues its calls itself, in a function."""
        return {f"joint.{i}": f"joint_blocks.{i}" for i in range(len(module.joint_blocks))}

    def site_among(self, site: str, layout: TokenLayout, num_tokens: int) -> str:
        image = site.replace("joint", "image")
        return image if num_tokens == self.site_layout(image, layout).num_tokens else site

    def site_layout(self, site: str, layout: TokenLayout) -> TokenLayout:
        if site.startswith("joint"):
            return layout
        return TokenLayout.of(segment for segment in layout.segments if segment.role == "main")

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(3, "c_crossattn")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem is not None:
            return problem
        patch = call.module.patch_size
        registers = Segment("register", call.module.register_length)
        return TokenLayout.of((registers, Segment("text", text.shape[1]), main_segment(latent, (patch, patch))))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """SD3 makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size)
        return TokenLayout.of((Segment("register", module.register_length), Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the image-stream projections; q, k and v are rows of one parameter, in this order.

        Source: `mmdit_to_diffusers` of ComfyUI 0.30.
        """
        width, targets = module.hidden_size, {}
        for _, ours, theirs in _calls(module):
            targets |= rows_of(theirs, PARTS, f"{ours}.qkv", (width,) * 3, width)
            targets |= rows_of(theirs, ("to_out.0",), f"{ours}.proj", (width,), width)
        return with_biases(targets)

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {theirs: site for site, _, theirs in _calls(module)}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms; the biases of the outputs in SD3, which has no norm weights."""
        has_norms = not missing_attributes(module, ("joint_blocks.0.x_block.attn.ln_q.weight",))
        return tuple(f"{ours}.{'ln_q.weight' if has_norms else 'proj.bias'}" for _, ours, _ in _calls(module))

    def site_weights(self, module: Any) -> dict[str, tuple[str, ...]]:
        """The text's belong to the call that it takes part in."""
        text = {f"joint.{i}": (f"joint_blocks.{i}.context_block.attn",) for i in range(len(module.joint_blocks))}
        return {site: (ours, *text.get(site, ())) for site, ours, _ in _calls(module)}


def _calls(module: Any) -> list[tuple[str, str, str]]:
    """Return (site, path of its projections, their diffusers name) in the order they run."""
    found = []
    for i, block in enumerate(module.joint_blocks):
        ours, theirs = f"joint_blocks.{i}.x_block", f"transformer_blocks.{i}"
        found.append((f"joint.{i}", f"{ours}.attn", f"{theirs}.attn"))
        if not missing_attributes(block, ("x_block.attn2",)):
            found.append((f"image.{i}", f"{ours}.attn2", f"{theirs}.attn2"))
    return found
