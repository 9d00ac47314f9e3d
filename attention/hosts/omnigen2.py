"""OmniGen2.

Sequence: text, one run of tokens per reference latent, main grid. Several heads share keys and values. Refiners of the
text, of the references and of the picture run before; sites are told by their modules, so these are never touched.
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
    reference_segments,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
STRUCTURE = (
    "x_embedder",
    "ref_image_patch_embedder",
    "time_caption_embed",
    "noise_refiner",
    "ref_image_refiner",
    "context_refiner",
    "image_index_embedding",
    "layers.0.attn.to_q",
    "layers.0.attn.norm_q",
    "layers.0.attn.kv_heads",
)


class OmniGen2Host(Host):
    """OmniGen2: 32 layers, head dimension 120; 21 heads of queries, 7 of keys and values."""

    name = "omnigen2"
    title = "OmniGen2"
    default_text_tokens = 256  # prompts are not padded; about 180 words with the template around them
    wrapped = "apply_model"

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.layers[0].attn
        return numbered_sites("blocks", len(module.layers), attention.heads, attention.dim_head)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"layers.{i}.attn" for i in range(len(module.layers))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(3, "c_crossattn")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem is not None:
            return problem
        patch = (call.module.patch_size, call.module.patch_size)
        references = reference_segments(call.kwargs.get("ref_latents"), patch)
        return TokenLayout.of((Segment("text", text.shape[1]), *references, main_segment(latent, patch)))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """OmniGen2 makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size)
        return TokenLayout.of((Segment("text", text_tokens), main))

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the projections, which have no biases; diffusers names them alike."""
        attention, width = module.layers[0].attn, module.hidden_size
        inner, shared = (heads * attention.dim_head for heads in (attention.heads, attention.kv_heads))
        shapes = {
            "to_q": (inner, width),
            "to_k": (shared, width),
            "to_v": (shared, width),
            "to_out.0": (width, inner),
        }
        return {
            f"{path}.{part}.weight": WeightTarget(f"{path}.{part}.weight", 0, shape)
            for path in self.site_modules(module).values()
            for part, shape in shapes.items()
        }

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {path: site for site, path in self.site_modules(module).items()}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every layer."""
        return tuple(f"{path}.norm_q.weight" for path in self.site_modules(module).values())
