"""PixelDiT, and PiD which decodes latents with it; both work on pixels.

Sequence: text, main grid. After these blocks the patches attend to each other without text, once per pixel block, each
as one token: the sites `pixel.N`, of another width.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import Host, ModelCall, Site, main_segment, missing_structure, numbered_sites, planned_main, wrong_inputs

STRUCTURE = (
    "pixel_embedder",
    "s_embedder",
    "y_pos_embedding",
    "txt_max_length",
    "patch_blocks.0.attn.qkv_x",
    "patch_blocks.0.attn.q_norm_x",
    "pixel_blocks.0.compress_to_attn",
    "pixel_blocks.0.attn.qkv",
)


class PixelDiTHost(Host):
    """PixelDiT: 14 blocks of patches with head dimension 64, 2 of pixels with 72."""

    name = "pixeldit"
    title = "PixelDiT"
    default_text_tokens = 300  # the most that the model reads

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        patches, pixels = module.patch_blocks[0].attn, module.pixel_blocks[0].attn
        joint = numbered_sites("joint", len(module.patch_blocks), patches.num_heads, patches.head_dim)
        return joint + numbered_sites("pixel", len(module.pixel_blocks), pixels.num_heads, pixels.head_dim)

    def site_modules(self, module: Any) -> dict[str, str]:
        joint = {f"joint.{i}": f"patch_blocks.{i}.attn" for i in range(len(module.patch_blocks))}
        return joint | {f"pixel.{i}": f"pixel_blocks.{i}.attn" for i in range(len(module.pixel_blocks))}

    def site_layout(self, site: str, layout: TokenLayout) -> TokenLayout:
        if site.startswith("joint"):
            return layout
        return TokenLayout.of(segment for segment in layout.segments if segment.role == "main")

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        picture, text, module = call.argument(0, "x"), call.argument(2, "context"), call.module
        problem = wrong_inputs(self.title, picture, (4,), text)
        if problem is not None:
            return problem
        main = main_segment(picture, (module.patch_size, module.patch_size))
        return TokenLayout.of((Segment("text", min(text.shape[1], module.txt_max_length)), main))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """PixelDiT makes pictures, so `frames` is not used."""
        return TokenLayout.of((Segment("text", text_tokens), planned_main(width, height, module.patch_size)))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of the picture."""
        joint = [f"patch_blocks.{i}.attn.q_norm_x.weight" for i in range(len(module.patch_blocks))]
        return (*joint, *(f"pixel_blocks.{i}.attn.q_norm.weight" for i in range(len(module.pixel_blocks))))
