"""Lumina-Image 2.0, Z-Image and Ming-Image.

Sequence: text, main grid; Z-Image fills each up to a multiple of 32 with pad tokens behind it, which are global like
the text. Z-Image with references (omni): the texts of all references before the prompt, then vision features of each
reference and of the picture, the references' tokens, main grid. Ming-Image: text and what its encoder adds to it, main
grid (its frames are the layers of a layered picture), reference frames. The refiners run before there is a block
index, so they are no sites. No call gets a mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..layout import Reason, Segment, TokenLayout, reference_segment
from .base import (
    Host,
    ModelCall,
    Site,
    WeightTarget,
    grid_of,
    main_segment,
    missing_attributes,
    missing_structure,
    numbered_sites,
    planned_main,
    reference_segments,
    rows_of,
    site_of_block,
    wrong_inputs,
)

PIXELS_PER_LATENT = 8
STRUCTURE = (
    "x_embedder",
    "cap_embedder",
    "noise_refiner",
    "context_refiner",
    "rope_embedder",
    "layers.0.attention.qkv",
    "layers.0.attention.out",
)


class LuminaHost(Host):
    """Lumina-Image 2.0: 26 layers, head dimension 96; Z-Image: 30 layers, head dimension 128."""

    name = "lumina2"
    title = "Lumina 2, Z-Image and Ming-Image"
    default_text_tokens = 128  # prompts are not padded beyond a multiple of 32; about 90 words

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        return numbered_sites("blocks", len(module.layers), module.n_heads, module.dim // module.n_heads)

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        module, latent, text = call.module, call.argument(0, "x"), call.argument(2, "context")
        problem = wrong_inputs(self.title, latent, (4, 5), text)
        if problem:
            return problem
        patch, more = (module.patch_size,) * 2, call.kwargs.get("direct_context")
        prompt = Segment("text", text.shape[1] + (0 if more is None else more.shape[1]))
        main = [main_segment(latent, (1, *patch)[-(latent.ndim - 2) :])]
        main += reference_segments(call.kwargs.get("ref_frames"), patch)
        references = call.kwargs.get("ref_latents") or ()
        if not references:
            return TokenLayout.of([*padded(module, prompt), *padded(module, *main)])
        texts = call.kwargs.get("ref_contexts") or ()
        vision = call.kwargs.get("siglip_feats") or ()
        segments = [each for i in range(len(references)) for each in reference_text(module, texts, i)]
        segments += padded(module, prompt)
        segments += [each for extra in texts[len(references) :] for each in padded(module, text_segment(extra))]
        if module.siglip_embedder is not None:
            segments += [each for i in range(len(references)) for each in vision_tokens(module, vision, i)]
            segments += vision_tokens(module, (), 0)  # of the picture itself: pads only
        for reference in references:
            segments += padded(module, reference_segment(grid_of(reference, patch)))
        return TokenLayout.of([*segments, *padded(module, *main)])

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """These models make pictures, so `frames` is not used."""
        works_on_pixels = not missing_attributes(module, ("dec_net",))
        main = planned_main(width, height, module.patch_size * (1 if works_on_pixels else PIXELS_PER_LATENT))
        return TokenLayout.of([*padded(module, Segment("text", text_tokens)), *padded(module, main)])

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the projections: q, k and v are rows of one parameter, without biases.

        Source: key names of diffusers, and `z_image_to_diffusers` of ComfyUI 0.30.
        """
        targets: dict[str, WeightTarget] = {}
        for i, layer in enumerate(module.layers):
            name, attention = diffusers_name(module, i), layer.attention
            rows = [n * layer.head_dim for n in (module.n_heads, attention.n_kv_heads, attention.n_kv_heads)]
            targets |= rows_of(name, ("to_q", "to_k", "to_v"), f"layers.{i}.attention.qkv", rows, module.dim)
            targets |= rows_of(name, ("to_out.0",), f"layers.{i}.attention.out", (module.dim,), module.dim)
        return targets

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {diffusers_name(module, i): f"blocks.{i}" for i in range(len(module.layers))}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every layer."""
        return tuple(f"layers.{i}.attention.q_norm.weight" for i in range(len(module.layers)))

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        return site_of_block(options, {"double": "blocks"})


def diffusers_name(module: Any, layer: int) -> str:
    """Return what diffusers calls a layer's attention: the two models differ."""
    return f"layers.{layer}.{'attn' if module.pad_tokens_multiple is None else 'attention'}"


def padded(module: Any, *segments: Segment) -> list[Segment]:
    """Return segments and the pad tokens that fill them up."""
    multiple = module.pad_tokens_multiple or 1
    return [*segments, Segment("pad", -sum(segment.length for segment in segments) % multiple)]


def text_segment(text: Any) -> Segment:
    """Return the tokens of a text."""
    return Segment("text", text.shape[1])


def reference_text(module: Any, texts: Sequence[Any], index: int) -> list[Segment]:
    """Return the tokens of a reference's text, pads where it has none."""
    if index < len(texts) and texts[index] is not None:
        return padded(module, text_segment(texts[index]))
    return [Segment("pad", module.pad_tokens_multiple)]


def vision_tokens(module: Any, features: Sequence[Any], index: int) -> list[Segment]:
    """Return the tokens of a reference's vision features (B, H, W, C), pads where it has none."""
    if index < len(features) and features[index] is not None:
        return padded(module, Segment("reference", features[index].shape[1] * features[index].shape[2]))
    return [Segment("pad", module.pad_tokens_multiple)]
