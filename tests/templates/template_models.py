"""The models that templates name, as tiny random ones of the same class: which file is of which family.

Shapes are those of `tests/attention/hosts/family_*.py` with the channels of the family's real latents, since nodes of
templates make latents themselves.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import family_boogu
import family_chroma
import family_cogvideox
import family_cosmos_predict2
import family_flux
import family_flux2
import family_hidream
import family_hunyuan_video
import family_ideogram4
import family_joyimage
import family_kandinsky5
import family_krea2
import family_lens
import family_ltx
import family_lumina
import family_mage_flow
import family_minimax_h3
import family_omnigen2
import family_pixeldit
import family_qwen_image
import family_sd3
import family_wan
import torch
from families import default_operations, noise, seeded
from torch import Tensor

WAN = {**family_wan.CONFIG, "in_dim": 16, "out_dim": 16, "image_model": "wan2.1", "model_type": "t2v"}
CHROMA = {key: value for key, value in family_chroma.CONFIG.items() if key != "image_model"}
KANDINSKY = {**family_kandinsky5.CONFIG, "in_visual_dim": 16, "out_visual_dim": 16}
ANIMA = {**family_cosmos_predict2.CONFIG, "in_channels": 16, "out_channels": 16, "crossattn_emb_channels": 1024}
H3 = {**family_minimax_h3.CONFIG, "latents_dim": 24, "audio_latents_dim": 32}
PID = {**family_pixeldit.CONFIG, "lq_latent_channels": 16, "lq_hidden_dim": 8, "lq_num_res_blocks": 1}
LTX_2 = {
    **family_ltx.CONFIG, "in_channels": 128, "audio_in_channels": 128, "audio_cross_attention_dim": 32,
    "audio_attention_head_dim": 16, "audio_num_attention_heads": 2, "connector_attention_head_dim": 8,
    "connector_num_attention_heads": 2, "connector_num_layers": 1,
}  # fmt: skip
Extra = Callable[[Tensor], dict[str, Any]]
Finish = Callable[[Any], None]


def nothing(_: Any) -> None:
    """Leave a model as it is."""


def nothing_more(_: Tensor) -> dict[str, Any]:
    """Give nothing beside the text."""
    return {}


def with_mask(text: Tensor) -> dict[str, Any]:
    """Return the mask that a text encoder gives beside its text."""
    return {"attention_mask": torch.ones(1, text.shape[1], dtype=torch.long)}


def unprocessed(_: Tensor) -> dict[str, Any]:
    """Return the mark of text that LTX-2's own connectors are to read."""
    return {"unprocessed_ltxav_embeds": True}


def with_llama(text: Tensor) -> dict[str, Any]:
    """Return the layers of Llama that HiDream's text encoders give."""
    return {"conditioning_llama3": noise(1, 3, text.shape[1], 24, seed=2)}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A family of models.

    Args:
        files: a pattern of the names of its files, in lower case.
        config: ComfyUI's class of it in `comfy.supported_models`.
        shapes: what its model is made with.
        width: of its text.
        extra: what its text encoder gives beside the text, from the text.
        pooled: width of the pooled text, 0 for none.
        vision: width of what its image encoder gives.
        sound: layers and channels of what its encoder of sound gives.
        finish: changes what random weights do not fill, or what is too large.
    """

    files: str
    config: str
    shapes: Mapping[str, Any]
    width: int
    extra: Extra = nothing_more
    pooled: int = 0
    vision: int = 1280
    sound: tuple[int, int] = (33, 8)
    finish: Finish = nothing

    def build(self) -> Any:
        """Return the model as ComfyUI wraps it."""
        import comfy.supported_models

        config = getattr(comfy.supported_models, self.config)(dict(self.shapes))
        for name in config.unet_config.keys() & self.shapes.keys():  # ComfyUI takes some for granted of a class
            config.unet_config[name] = self.shapes[name]
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        self.finish(model.diffusion_model)
        seeded(model.diffusion_model)
        return model.eval()


def positions(model: Any) -> None:
    """Fill the positions of Stable Diffusion 3, a buffer that checkpoints bring."""
    model.pos_embed.copy_(noise(*model.pos_embed.shape, seed=3))


def frequencies(model: Any) -> None:
    """Fill MiniMax H3's frequencies, a buffer that checkpoints bring."""
    model.rope.inv_freq.copy_(torch.logspace(0, -4, len(model.rope.inv_freq)))


def without_adapter(model: Any) -> None:
    """Take out Anima's 100 M parameters that have done their work before."""
    model.llm_adapter = torch.nn.Identity()


def small_audio(model: Any) -> None:
    """Take HuMo's sound in 8 channels, not 1280."""
    from comfy.ldm.wan.model import AudioProjModel

    model.audio_proj = AudioProjModel(seq_len=8, blocks=5, channels=8, intermediate_dim=8, **default_operations())


def tiny(files: str, config: str, shapes: Mapping[str, Any], width: int, **more: Any) -> Tiny:
    return Tiny(files=files, config=config, shapes=shapes, width=width, **more)


def flux(files: str, config: str = "Flux", **shapes: Any) -> Tiny:
    return tiny(files, config, {**family_flux.CONFIG, **shapes}, 64, pooled=32)


def wan(
    files: str, config: str = "WAN21_T2V", finish: Finish = nothing, sound: tuple[int, int] = (33, 8), **shapes: Any
) -> Tiny:
    return tiny(files, config, {**WAN, **shapes}, 16, finish=finish, sound=sound)


def channels(shapes: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {**shapes, "in_channels": number, "out_channels": number}


FAMILIES = (
    flux("flux1-canny", in_channels=32),
    flux(r"flux1-fill|flux\.1-fill", "FluxInpaint", in_channels=96),
    flux("flux1-schnell", "FluxSchnell"),
    flux("flux1-", guidance_embed=True),
    tiny("longcat", "LongCatImage", {**family_flux.CONFIG, "vec_in_dim": None, "txt_ids_dims": [1, 2]}, 64),
    tiny("ovis", "Flux", family_flux.OVIS, 64),
    tiny("flux-2-klein", "Flux2", {**channels(family_flux2.CONFIG, 128), "guidance_embed": False}, 24),
    tiny("flux2", "Flux2", channels(family_flux2.CONFIG, 128), 24),
    tiny(
        "chroma-radiance",
        "ChromaRadiance",
        {**CHROMA, **family_chroma.RADIANCE, **channels({}, 3), "patch_size": 4},
        24,
    ),
    tiny("chroma1", "Chroma", {**CHROMA, **channels({}, 64), "patch_size": 2}, 24),
    tiny("qwen_image|firered", "QwenImage", {**family_qwen_image.CONFIG, "in_channels": 64, "out_channels": 16}, 24),
    tiny("mage_flow", "MageFlow", channels(family_mage_flow.CONFIG, 128), 24),
    tiny("z_image", "ZImage", {**family_lumina.Z_IMAGE, "in_channels": 16}, 24, extra=with_mask),
    tiny("newbie", "Lumina2", {**family_lumina.LUMINA, "in_channels": 16, "clip_text_dim": 12}, 24, pooled=12),
    tiny("netayume", "Lumina2", {**family_lumina.LUMINA, "in_channels": 16}, 24, extra=with_mask),
    tiny("hunyuan_video", "HunyuanVideo", channels(family_hunyuan_video.VIDEO, 16), 24, pooled=12),
    tiny(
        "hunyuanvideo1.5|capybara",
        "HunyuanVideo15",
        {**family_hunyuan_video.VIDEO15, "in_channels": 65, "out_channels": 32},
        24,
        pooled=12,
        vision=20,
    ),
    tiny("kandinsky5lite_t2i", "Kandinsky5Image", {**KANDINSKY, "visual_embed_dim": 64}, 24, pooled=12),
    tiny("kandinsky5", "Kandinsky5", {**KANDINSKY, "visual_embed_dim": 132}, 24, pooled=12),
    tiny("krea2", "Krea2", {**family_krea2.CONFIG, "channels": 16}, 48),
    tiny("lens", "Lens", {**family_lens.CONFIG, "in_channels": 128, "out_channels": 32}, 24, extra=with_mask),
    tiny("joyai", "JoyImage", {**family_joyimage.CONFIG, "in_channels": 16}, 24),
    tiny("sd3", "SD3", {**family_sd3.CONFIG, "in_channels": 16}, 16, pooled=12, finish=positions),
    tiny("hidream", "HiDream", {**family_hidream.CONFIG, "in_channels": 16}, 16, pooled=12, extra=with_llama),
    tiny("anima", "Anima", ANIMA, 1024, finish=without_adapter),
    tiny("omnigen2", "Omnigen2", {**family_omnigen2.CONFIG, "in_channels": 16}, 16, extra=with_mask),
    tiny("boogu", "Boogu", {**family_boogu.CONFIG, "in_channels": 16}, 16, extra=with_mask),
    tiny("ideogram4", "Ideogram4", {**family_ideogram4.CONFIG, "in_channels": 128}, 24),
    tiny("minimax_h3", "MiniMaxH3", H3, 16, finish=frequencies),
    tiny("pixeldit", "PixelDiTT2I", family_pixeldit.CONFIG, 16, extra=with_mask),
    tiny("pid_flux1", "PiD", PID, 16, extra=with_mask),
    tiny("ltx-video", "LTXV", {**family_ltx.CONFIG, "in_channels": 128}, 16, extra=with_mask),
    tiny("ltx-2", "LTXAV", LTX_2, 16, extra=unprocessed),
    tiny("void_", "CogVideoX_Inpaint", {**family_cogvideox.CONFIG, "in_channels": 48, "out_channels": 16}, 16),
    wan("vace", "WAN21_Vace", model_type="vace", num_layers=4, vace_layers=2, vace_in_dim=96),
    wan("scail_2", "WAN21_SCAIL2", model_type="scail2", in_dim=20),
    wan("dancer", "WAN22_WanDancer", model_type="wandancer", in_dim=36, audio_inject_layers=[0], music_dim=256),
    wan("humo", "WAN21_HuMo", model_type="humo", in_dim=36, finish=small_audio),
    wan("s2v", "WAN22_S2V", model_type="s2v", audio_dim=8, cond_dim=16, audio_inject_layers=[0], sound=(25, 8)),
    wan("causal_forcing", "WAN21_CausalAR_T2V", causal_ar=True),
    wan("fun_control_5b", "WAN22_T2V", in_dim=148, out_dim=48, in_dim_ref_conv=48),
    wan("fun_inpaint_5b", "WAN22_T2V", in_dim=100, out_dim=48),
    wan("ti2v_5b", "WAN22_T2V", in_dim=48, out_dim=48),
    wan("wan2.2_fun_control", in_dim=52, in_dim_ref_conv=16),
    wan("wan2.1_fun_control", "WAN21_FunControl2V", model_type="i2v", in_dim=48),
    wan("wan2.1_fun_camera", "WAN21_Camera", model_type="camera", in_dim=32),
    wan("wan2.2_fun_camera", "WAN22_Camera", model_type="camera_2.2", in_dim=36),
    wan("wan2_1-i2v-14b", "WAN21_I2V", model_type="i2v", in_dim=36, dim=160, sound=(13, 768)),  # with InfiniteTalk
    wan("flf2v", "WAN21_I2V", model_type="i2v", in_dim=36, flf_pos_embed_token_number=514),
    wan("wan2.2_(i2v|fun_inpaint)", in_dim=36),
    wan("wan2.1_(i2v|fun_inp)|wan2_1-i2v-ati|wanmove|chrono_edit", "WAN21_I2V", model_type="i2v", in_dim=36),
    wan("wan2.[12]_(t2v|bernini)"),
)

NOT_SERVED = {  # by a pattern of file names: what these models are
    "v1-5|dreamshaper|sd_xl|svd_xt|lotus|sdpose": "a UNet",
    "ace_?step|stable[-_]audio": "sound",
    "hunyuan_?3d|triposplat": "three-dimensional shapes",
    "sam3|rt_detr": "recognition in pictures",
    "ernie-image|hidream_o1|seedvr2": "refused by Linearize, with the reason",
}


def family_of(file: str) -> Tiny | None:
    """Return the family of a model file, None for what is not a diffusion transformer that Linearize serves.

    Raises:
        LookupError: the file stands in neither table.
    """
    if any(re.search(pattern, file.lower()) for pattern in NOT_SERVED):
        return None
    for family in FAMILIES:
        if re.search(family.files, file.lower()):
            return family
    raise LookupError(f"{file} is in no family of template_models.py; give it one, or say why it has none")
