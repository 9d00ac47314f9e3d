"""Write checkpoints with random weights, small enough for a laptop, that ComfyUI's stock loader recognises.

Their pictures are coloured noise. With two blocks of each sort the FLUX is another shape than the demo's trained model.
"""

from pathlib import Path

FLUX = {  # 7 M parameters; ComfyUI derives heads and depths from shapes, the head dimension is always 128
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
    "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
    "txt_ids_dims": [],
}  # fmt: skip
WAN = {  # 4 M parameters, most of them in what ComfyUI does not derive: the head dimension, T5's width
    "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2,
}  # fmt: skip
WAN_I2V = WAN | {"in_dim": 36}  # of Wan 2.2: noise, the picture's latent and its mask
FLUX2 = {  # 4 M parameters; the head dimension is always 128
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 64,
    "hidden_size": 256, "mlp_ratio": 3.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2,
    "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": False,
    "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip
SD3 = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "mlp_ratio": 4.0, "adm_in_channels": 2048,
    "pos_embed_max_size": 24, "num_patches": 576, "qk_norm": "rms", "x_block_self_attn_layers": [0],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
}  # fmt: skip


HUNYUAN_VIDEO = {  # 6 M parameters; the head dimension is always 128
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
    "context_in_dim": 64, "vec_in_dim": 768, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
LTX = {  # 3 M parameters; always 32 heads and a text width of 4096
    "in_channels": 128, "num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 256,
}  # fmt: skip


def random_weights(shapes: dict, seed: int = 0) -> dict:
    """Return tensors for a state dict of `shapes` that keep activations near unit size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name].shape
        if len(shape) >= 2:
            weights[name] = torch.randn(shape, generator=generator) * shapes[name][0].numel() ** -0.5
        elif name.endswith(".bias"):
            weights[name] = torch.randn(shape, generator=generator) * 0.02
        else:
            weights[name] = torch.ones(shape)
    return weights


def write_tiny_flux(path: Path) -> None:
    """Write a FLUX."""
    from comfy.ldm.flux.model import Flux

    _write(path, Flux, FLUX, "Flux")


def write_tiny_wan(path: Path) -> None:
    """Write a Wan 2.1, text to video."""
    from comfy.ldm.wan.model import WanModel

    _write(path, WanModel, WAN, "WAN21_T2V")


def write_tiny_wan_low(path: Path) -> None:
    """Write the second expert of a Wan 2.2 whose first is `write_tiny_wan`: the same shapes, other weights."""
    from comfy.ldm.wan.model import WanModel

    _write(path, WanModel, WAN, "WAN21_T2V", seed=1)


def write_tiny_wan_i2v(path: Path) -> None:
    """Write the first expert of a Wan 2.2, picture to video."""
    from comfy.ldm.wan.model import WanModel

    _write(path, WanModel, WAN_I2V, "WAN21_T2V")


def write_tiny_wan_i2v_low(path: Path) -> None:
    """Write its second expert."""
    from comfy.ldm.wan.model import WanModel

    _write(path, WanModel, WAN_I2V, "WAN21_T2V", seed=1)


def write_tiny_flux2(path: Path) -> None:
    """Write a FLUX.2 Klein."""
    from comfy.ldm.flux.model import Flux

    _write(path, Flux, FLUX2, "Flux2")


def write_tiny_vace(path: Path) -> None:
    """Write a Wan 2.1 with VACE blocks."""
    from comfy.ldm.wan.model import VaceWanModel

    _write(path, VaceWanModel, WAN | {"vace_layers": 1, "vace_in_dim": 96}, "WAN21_Vace")


def write_tiny_sd3(path: Path) -> None:
    """Write a Stable Diffusion 3.5 medium, whose first block attends within the picture once more."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    _write(path, OpenAISignatureMMDITWrapper, SD3, "SD3")


def write_tiny_hunyuan_video(path: Path) -> None:
    """Write a HunyuanVideo, text to video."""
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    _write(path, HunyuanVideo, HUNYUAN_VIDEO, "HunyuanVideo")


def write_tiny_ltx(path: Path) -> None:
    """Write an LTX-Video."""
    from comfy.ldm.lightricks.model import LTXVModel

    _write(path, LTXVModel, LTX, "LTXV")


def _write(path: Path, model_class: type, config: dict, family: str, seed: int = 0) -> None:
    import comfy.model_detection
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    model = model_class(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    weights = random_weights(model.state_dict(), seed)
    found = type(comfy.model_detection.model_config_from_unet(weights, "")).__name__
    if not found.startswith(family):
        raise SystemExit(f"ComfyUI takes this checkpoint for {found}, not for {family}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(weights, partial)
    partial.replace(path)
