"""Ideogram 4.

Sequence: text, main grid; without a prompt the grid alone. A latent cell is 16 x 16 pixels and one token. Where a batch
pads its prompts, a mask keeps the padding to itself; such calls are declined.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import Host, ModelCall, Site, main_segment, missing_structure, numbered_sites, planned_main

PIXELS_PER_LATENT = 16
STRUCTURE = (
    "input_proj",
    "llm_cond_proj",
    "t_embedding",
    "embed_image_indicator",
    "mrope_section",
    "layers.0.attention.qkv",
    "layers.0.attention.norm_q",
    "layers.0.adaln_modulation",
    "final_layer",
)


class Ideogram4Host(Host):
    """Ideogram 4: 34 layers, head dimension 256."""

    name = "ideogram4"
    title = "Ideogram 4"
    default_text_tokens = 256  # prompts are not padded; about 180 words

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.layers[0].attention
        return numbered_sites("blocks", len(module.layers), attention.num_heads, attention.head_dim)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"layers.{i}.attention" for i in range(len(module.layers))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(2, "context")
        if getattr(latent, "ndim", 0) != 4:
            return Reason("arguments", f"{self.title} was called without the 4-D latent that tells its token grid")
        text_tokens = 0 if text is None else text.shape[1]
        return TokenLayout.of((Segment("text", text_tokens), main_segment(latent, (1, 1))))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Ideogram makes pictures, so `frames` is not used."""
        return TokenLayout.of((Segment("text", text_tokens), planned_main(width, height, PIXELS_PER_LATENT)))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every layer."""
        return tuple(f"{path}.norm_q.weight" for path in self.site_modules(module).values())
