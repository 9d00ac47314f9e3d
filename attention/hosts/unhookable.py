"""Models that no host can serve, each with the reason that a user is shown.

What is listed here was read in ComfyUI 0.30.0 to 0.38.1; tests run some of these models, and turn red when ComfyUI
changes. What no list names is found by `entry_points.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import missing_attributes

HIDDEN = "ComfyUI does not let other code see its attention calls"
NO_GRID = "its tokens lie on no grid, which every kind of attention here goes by"
SOUND = "it makes sound, and Linearize is for pictures and video"
UNET = "Linearize is for diffusion transformers"
VOXELS = "it makes shapes of voxels, and Linearize is for pictures and video"
POSES = "each of its frames attends to the clip and to a pose of its own, and no kind of attention here covers that"
SPLIT = "its pictures attend to more tokens than they have, and no kind of attention here covers such calls"


@dataclass(frozen=True, slots=True)
class Unhookable:
    """A kind of model.

    Args:
        title: for people.
        structure: attribute paths that, together, only models of this kind have.
        reason: why none of its sites can be linearized, as the end of a sentence.
    """

    title: str
    structure: Sequence[str]
    reason: str


UNHOOKABLE = (
    Unhookable("ERNIE-Image", ("text_proj", "time_embedding", "final_linear", "layers.0.adaLN_sa_ln"), HIDDEN),
    Unhookable("PixArt", ("t_block", "y_embedder", "blocks.0.attn.qkv", "blocks.0.cross_attn"), HIDDEN),
    Unhookable("Hunyuan-DiT", ("mlp_t5", "text_embedding_padding", "blocks.0.attn1"), HIDDEN),
    Unhookable("SeedVR2", ("vid_in", "txt_in", "emb_in", "vid_out"), "its attention is local already"),
    Unhookable("Hunyuan3D 2.0", ("latent_in", "cond_in", "double_blocks", "single_blocks"), NO_GRID),
    Unhookable("Hunyuan3D 2.1", ("x_embedder", "guidance_cond_proj_dim", "blocks.0.attn1"), NO_GRID),
    Unhookable("Trellis 2", ("shape2txt", "image_attn_mode_structure", "image_attn_mode_texture"), VOXELS),
    Unhookable("TripoSplat", ("cam_out_layer", "noise_repo_layers"), NO_GRID),
    Unhookable("ACE-Step", ("genre_embedder", "lyric_encoder", "transformer_blocks"), SOUND),
    Unhookable("ACE-Step 1.5", ("decoder.layers", "encoder.lyric_encoder", "detokenizer"), SOUND),
    Unhookable("MiniMax Music 3", ("latent_conditioners", "diffusion_transformer", "cond_layer_logits"), SOUND),
    Unhookable("YuE2", ("model.layers", "vae2llm", "llm2vae", "latent_pos_embed"), SOUND),
    Unhookable("Stable Audio", ("to_timestep_embed", "preprocess_conv", "postprocess_conv"), SOUND),
    Unhookable("a UNet such as Stable Diffusion XL", ("input_blocks", "middle_block", "output_blocks"), UNET),
    Unhookable("Stable Cascade", ("down_blocks", "up_blocks", "clip_norm", "clf"), UNET),
    Unhookable("HiDream-O1", ("language_model", "t_embedder1", "x_embedder.proj1", "final_layer2"), SPLIT),
    Unhookable("Qwen-Image 2.1", ("txt_in.text_norm", "time_text_embed", "modulation", "transformer_blocks"), SPLIT),
    Unhookable("SenseNova U1.5", ("fm_modules", "language_model.model.layers.0.self_attn.q_proj_mot_gen"), SPLIT),
    Unhookable("Wan-Animate 2", ("blocks.0.forward_pose", "blocks.0.self_attn.forward_gen"), POSES),
)


def why_unhookable(module: Any) -> str | None:
    """Return the sentence that tells why Linearize cannot work on this model, or None if it is none of these."""
    for kind in UNHOOKABLE:
        if not missing_attributes(module, kind.structure):
            return f"Linearize cannot work on {kind.title}: {kind.reason}"
    return None
