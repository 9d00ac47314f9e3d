"""Models that no host can serve are refused with their reason, and really are as that reason says."""

import pytest
import torch
from families import default_operations, noise, seeded
from test_contract import Passing, opaque

from linearize.attention.hosts import HOSTS, find_host
from linearize.attention.hosts.unhookable import UNHOOKABLE, why_unhookable


def ernie():
    from comfy.ldm.ernie.model import ErnieImageModel

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 4}
    return ErnieImageModel(**sizes, out_channels=4, text_in_dim=24, rope_axes_dim=(4, 6, 6), **default_operations())


def pixart():
    from comfy.ldm.pixart.pixartms import PixArtMS

    sizes = {"hidden_size": 48, "depth": 1, "num_heads": 2, "caption_channels": 24, "model_max_length": 5}
    return PixArtMS(**sizes, micro_condition=False, **default_operations())


def hunyuan_dit():
    from comfy.ldm.hydit.models import HunYuanDiT

    return HunYuanDiT(hidden_size=64, depth=2, num_heads=2, text_states_dim=32, text_states_dim_t5=32, **meta())


def seedvr2():
    from comfy.ldm.seedvr.model import NaDiT

    return NaDiT(1e-5, 2, "swiglu", vid_dim=64, txt_in_dim=24, heads=2, head_dim=32, rope_dim=32, **meta())


def hunyuan3d():
    from comfy.ldm.hunyuan3d.model import Hunyuan3Dv2

    return Hunyuan3Dv2(hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, **meta())


def hunyuan3d_21():
    from comfy.ldm.hunyuan3dv2_1.hunyuandit import HunYuanDiTPlain

    return HunYuanDiTPlain(hidden_size=32, num_heads=2, depth=2, num_moe_layers=1, num_experts=2, **meta())


def triposplat():
    from comfy.ldm.triposplat.model import LatentSeqMMFlowModel

    return LatentSeqMMFlowModel(q_token_length=8, model_channels=128, num_blocks=1, num_refiner_blocks=1, **meta())


def ace():
    from comfy.ldm.ace.model import ACEStepTransformer2DModel

    return ACEStepTransformer2DModel(num_layers=1, inner_dim=64, num_attention_heads=1, **meta())


def ace_15():
    from comfy.ldm.ace.ace_step15 import AceStepConditionGenerationModel

    sizes = {"hidden_size": 64, "encoder_hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "encoder_num_heads": 2}
    layers = {"num_dit_layers": 1, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1}
    return AceStepConditionGenerationModel(**sizes, **layers, head_dim=32, fsq_dim=64, **default_operations())


def stable_audio():
    from comfy.ldm.audio.dit import AudioDiffusionTransformer

    return AudioDiffusionTransformer(io_channels=4, embed_dim=64, depth=1, num_heads=2, **meta())


def sdxl():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    sizes = {"image_size": 8, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [1]}
    depth = {"transformer_depth": [1], "transformer_depth_output": [1, 1], "transformer_depth_middle": 1}
    heads = {"num_head_channels": 16, "use_spatial_transformer": True, "context_dim": 24}
    return UNetModel(**sizes, **depth, **heads, channel_mult=(1,), **meta())


def cascade():
    from comfy.ldm.cascade.stage_c import StageC

    return StageC(**meta())


def hidream_o1():
    from comfy.ldm.hidream_o1.model import HiDreamO1Transformer

    return HiDreamO1Transformer(**meta())


def cascade_b():
    from comfy.ldm.cascade.stage_b import StageB

    return StageB(**meta())


def trellis():
    model = pytest.importorskip("comfy.ldm.trellis2.model", reason="newer than this ComfyUI")
    return model.Trellis2(32, model_channels=64, num_blocks=1, num_heads=2, **meta())


def minimax_music():
    return pytest.importorskip("comfy.ldm.minimax_music.dit", reason="newer than this ComfyUI").MiniMaxMusic3DiT(
        **meta()
    )


def wan_animate_2():
    model = pytest.importorskip("comfy.ldm.wan.model_animate2", reason="newer than this ComfyUI")
    sizes = {"dim": 64, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 16, "freq_dim": 16}
    return model.WanAnimate2Model(**sizes, **meta())


class Stub(torch.nn.Module):
    """The structure of a model that this ComfyUI has not: modules by dotted path."""

    def __init__(self, *paths):
        super().__init__()
        for path in paths:
            first, _, rest = path.partition(".")
            if rest.startswith("0"):
                self.add_module(first, torch.nn.ModuleList([Stub(*filter(None, [rest[2:]]))]))
            elif rest:
                held = [each.partition(".")[2] for each in paths if each.startswith(f"{first}.")]
                self.add_module(first, Stub(*held))
            else:
                self.add_module(first, torch.nn.Linear(1, 1))


def yue2():
    """Read in a copy of ComfyUI's `comfy/ldm/yue2/model.py`."""
    return Stub("model.layers.0.self_attn", "model.norm", "vae2llm", "llm2vae", "time_embedder.mlp", "latent_pos_embed")


def qwen_image_21():
    """Read in ComfyUI's `comfy/ldm/qwen_image21/model.py` of 0.38: an image attends to its prompt too."""
    blocks = "transformer_blocks.0.attn.to_q"
    return Stub("time_text_embed", "txt_in.text_norm", "txt_in.in_layer", "img_in", "modulation", blocks, "norm_out")


def sensenova():
    """Read in ComfyUI's `comfy/ldm/sensenova/model.py` of 0.38: `forward_generation` joins keys of the prompt."""
    attention = "language_model.model.layers.0.self_attn.q_proj_mot_gen"
    return Stub("vision_model", attention, "fm_modules.timestep_embedder", "fm_modules.fm_head")


def meta():
    """As `default_operations`, without memory for the weights."""
    return {**default_operations(), "device": "meta"}


MODELS = {
    "ERNIE-Image": ernie,
    "PixArt": pixart,
    "Hunyuan-DiT": hunyuan_dit,
    "SeedVR2": seedvr2,
    "Hunyuan3D 2.0": hunyuan3d,
    "Hunyuan3D 2.1": hunyuan3d_21,
    "Trellis 2": trellis,
    "TripoSplat": triposplat,
    "ACE-Step": ace,
    "ACE-Step 1.5": ace_15,
    "MiniMax Music 3": minimax_music,
    "YuE2": yue2,
    "Stable Audio": stable_audio,
    "a UNet such as Stable Diffusion XL": sdxl,
    "Stable Cascade": cascade,
    "HiDream-O1": hidream_o1,
    "Qwen-Image 2.1": qwen_image_21,
    "SenseNova U1.5": sensenova,
    "Wan-Animate 2": wan_animate_2,
}
MORE = {"Stable Cascade": cascade_b}  # of one kind, in a class of its own
METHODS = {"Wan-Animate 2"}  # told by their methods, which nothing stands in for


@pytest.mark.parametrize("title", MODELS)
def test_models_that_cannot_be_served_are_refused_with_their_reason(title, comfy):
    (kind,) = (kind for kind in UNHOOKABLE if kind.title == title)
    for build in (MODELS[title], MORE.get(title, MODELS[title])):
        model = build()
        for each in (model, Passing(model), *([] if title in METHODS else [opaque(model)])):
            with pytest.raises(ValueError, match=f"^Linearize cannot work on {title}: {kind.reason}$"):
                find_host(each)


def test_every_such_kind_is_tested():
    assert list(MODELS) == [kind.title for kind in UNHOOKABLE]
    assert not [kind.title for kind in UNHOOKABLE if "window" in kind.reason], "reasons hold for all kinds"


def test_no_model_of_a_host_is_taken_for_one(tiny):
    from families import collect

    for family in collect():
        assert why_unhookable(tiny(family)) is None, family.name


@pytest.mark.parametrize("build", [ernie, pixart])
def test_attention_that_comfyui_hides_never_reaches_an_override(build, comfy):
    """Turns red when ComfyUI shows these calls; then a host can be written."""
    seen = []

    def override(func, *args, **kwargs):
        seen.append(True)
        return func(*args, **kwargs)

    with torch.no_grad():
        output = seeded(build()).eval()(
            noise(1, 4, 40, 40), torch.tensor([0.5]), noise(1, 5, 24, seed=1),
            transformer_options={"optimized_attention_override": override},
        )  # fmt: skip
    assert output.shape == (1, 4, 40, 40) and not seen


def test_unknown_models_are_refused_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        find_host(torch.nn.Linear(2, 2))
    assert "does not know this model (Linear); it works on: " in str(error.value)
    assert all(host.title in str(error.value) for host in HOSTS)
