"""Boogu.

Sequence: text, one run of tokens per reference latent, main grid. In its double layers the picture attends to itself
and the references once more, without text: these calls are the sites `image.N`. Refiners run before and are never
touched.
"""

from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import Host, ModelCall, Site, main_segment, missing_structure, planned_main, reference_segments, wrong_inputs

PIXELS_PER_LATENT = 8
STRUCTURE = (
    "x_embedder",
    "ref_image_patch_embedder",
    "time_caption_embed",
    "image_index_embedding",
    "double_stream_layers.0.img_instruct_attn.norm_q",
    "double_stream_layers.0.img_self_attn.to_q",
    "single_stream_layers.0.attn.to_q",
)


class BooguHost(Host):
    """Boogu: 8 double and 32 single layers, head dimension 120; 28 heads of queries, 7 of keys and values."""

    name = "boogu"
    title = "Boogu"
    default_text_tokens = 256  # prompts are not padded; about 180 words with the template around them
    wrapped = "apply_model"

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        """`double.N` and after it `image.N`, then `single.N`."""
        attention = module.single_stream_layers[0].attn
        return tuple(Site(site, attention.heads, attention.dim_head) for site in self.site_modules(module))

    def site_modules(self, module: Any) -> dict[str, str]:
        paths = {}
        for i in range(len(module.double_stream_layers)):
            paths[f"double.{i}"] = f"double_stream_layers.{i}.img_instruct_attn"
            paths[f"image.{i}"] = f"double_stream_layers.{i}.img_self_attn"
        single = {f"single.{i}": f"single_stream_layers.{i}.attn" for i in range(len(module.single_stream_layers))}
        return paths | single

    def site_layout(self, site: str, layout: TokenLayout) -> TokenLayout:
        if not site.startswith("image"):
            return layout
        return TokenLayout.of(segment for segment in layout.segments if segment.role != "text")

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, text = call.argument(0, "x"), call.argument(3, "c_crossattn")
        problem = wrong_inputs(self.title, latent, (4,), text)
        if problem is not None:
            return problem
        patch = (call.module.patch_size, call.module.patch_size)
        references = reference_segments(call.kwargs.get("ref_latents"), patch)
        return TokenLayout.of((Segment("text", text.shape[1]), *references, main_segment(latent, patch)))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Boogu makes pictures, so `frames` is not used."""
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size)
        return TokenLayout.of((Segment("text", text_tokens), main))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every site."""
        return tuple(f"{path}.norm_q.weight" for path in self.site_modules(module).values())
