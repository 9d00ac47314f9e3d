"""Wan 2.1 and 2.2: T2V, I2V, TI2V, VACE, Fun, Camera, Phantom, Bernini, Animate, S2V, HuMo, SCAIL, WanDancer.

Sequence: the reference frame of Fun and the reference frames of SCAIL, then the main grid (frames, rows, columns), then
reference frames joined in time, then what a variant appends: references, motion frames, a pose video, in-context
latents. All but the main grid are global tokens. Text is seen in cross-attention, which is never a site.

The VACE blocks run with the options of the block before them, and the text may have as many tokens as the video, so
sites are told by their modules. The causal form runs as any other where a sampler asks for the whole clip; a sampler
that makes it frame by frame shows its calls to no other code, so nothing runs, and the run record says so.
"""

from collections.abc import Sequence
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
    reference_segments,
    with_biases,
)

FRAMES_PER_LATENT = 4  # after the first, which stands for itself
LATENT_CHANNELS_22 = 48  # of the autoencoder of Wan 2.2 5B, whose latents have half the sides
STRUCTURE = (
    "patch_embedding",
    "text_embedding",
    "time_projection",
    "rope_embedder",
    "blocks.0.self_attn.q",
    "blocks.0.self_attn.norm_q",
    "blocks.0.cross_attn.k",
    "blocks.0.ffn",
    "blocks.0.modulation",
    "head.head",
)
PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
MOTION_SCALES = (1, 2, 4)  # S2V's motion frames, from the nearest: their patches are so much larger along each axis


class WanHost(Host):
    """Wan: 30 blocks in the 1.3B and 5B models, 40 in 14B; head dimension 128."""

    name = "wan"
    title = "Wan"
    default_text_tokens = 0  # text is in cross-attention

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        """`blocks.N`, and `vace.N` after the block that it runs after."""
        heads, head_dim = module.num_heads, module.dim // module.num_heads
        return tuple(Site(site, heads, head_dim) for site, _ in _blocks(module))

    def site_modules(self, module: Any) -> dict[str, str]:
        return {site: f"{block}.self_attn" for site, block in _blocks(module)}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        latent, joined = call.argument(0, "x"), call.argument(4, "time_dim_concat")
        if getattr(latent, "ndim", 0) != 5:
            return Reason("arguments", f"{self.title} was called without the 5-D latent that tells its token grid")
        patch = call.module.patch_size
        before, after = _references(call, patch)
        in_time = reference_segments(_given(joined), patch)
        return TokenLayout.of((*before, main_segment(latent, patch), *in_time, *after))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Text is not part of the sequence."""
        pixels = 16 if module.out_dim == LATENT_CHANNELS_22 else 8
        latent_frames = (max(frames, 1) - 1) // FRAMES_PER_LATENT + 1
        return TokenLayout.of([planned_main(width, height, pixels * module.patch_size[-1], latent_frames)])

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return the self-attention projections, weights and biases.

        Source: key names of diffusers 0.35, `WanTransformer3DModel` and `WanVACETransformer3DModel`.
        """
        shape = module.dim, module.dim
        return with_biases(
            {
                f"{block}.attn1.{theirs}.weight": WeightTarget(f"{block}.self_attn.{ours}.weight", 0, shape)
                for _, block in _blocks(module)
                for theirs, ours in PROJECTIONS.items()
            }
        )

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        return {f"{block}.attn1": site for site, block in _blocks(module)}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every self-attention."""
        return tuple(f"{block}.self_attn.norm_q.weight" for _, block in _blocks(module))


def _blocks(module: Any) -> list[tuple[str, str]]:
    """Return (site, path of its block) in the order they run."""
    vace = getattr(module, "vace_layers_mapping", {})
    found = []
    for i in range(len(module.blocks)):
        found.append((f"blocks.{i}", f"blocks.{i}"))
        if i in vace:
            found.append((f"vace.{vace[i]}", f"vace_blocks.{vace[i]}"))
    return found


def _references(call: ModelCall, patch: Sequence[int]) -> tuple[list[Segment], list[Segment]]:
    """Return the references that a variant puts before, and after, the frames."""
    reference = _given(call.kwargs.get("reference_latent"))
    if not missing_attributes(call.module, ("patch_embedding_pose",)):  # SCAIL
        pose = _given(call.kwargs.get("pose_latents"))
        return reference_segments(reference, patch), reference_segments(pose, patch)
    if not missing_attributes(call.module, ("frame_packer",)):  # S2V
        buckets = call.module.frame_packer.zip_frame_buckets
        motion = [_motion(each, buckets, patch) for each in _given(call.kwargs.get("reference_motion"))]
        return [], reference_segments(reference, patch) + motion
    if not missing_attributes(call.module, ("blocks.0.audio_cross_attn_wrapper",)):  # HuMo
        return [], reference_segments(reference, patch)
    if getattr(call.module, "ref_conv", None) is None:  # others leave it aside
        reference = []
    return reference_segments(reference, patch[1:]), reference_segments(call.kwargs.get("context_latents"), patch)


def _given(latent: Any) -> list[Any]:
    return [] if latent is None else [latent]


def _motion(motion: Any, buckets: Sequence[int], patch: Sequence[int]) -> Segment:
    """Return S2V's motion frames: so many frames per bucket, in ever larger patches, what is left of them cut off."""
    _, rows, columns = patch
    height, width = motion.shape[-2:]
    tokens = sum(
        (frames // scale) * (height // (rows * scale)) * (width // (columns * scale))
        for frames, scale in zip(buckets, MOTION_SCALES, strict=True)
    )
    return Segment("reference", tokens)
