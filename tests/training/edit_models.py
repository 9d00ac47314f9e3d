"""Tiny edit and control models of ComfyUI's own classes, and the conditionings that their nodes make."""

from dataclasses import dataclass
from typing import Any

import torch

WAN = {"model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2,
       "image_model": "wan2.1"}  # fmt: skip
CONFIGS = {  # ComfyUI's configuration, and the numbers of the model
    "qwen": ("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
                           "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24,
                           "axes_dims_rope": (8, 12, 12)}),
    "wan_i2v": ("WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}),
    "sd3": ("SD3", {"in_channels": 16, "patch_size": 2, "depth": 2, "mlp_ratio": 2.0, "adm_in_channels": 32,
                    "pos_embed_max_size": 24, "num_patches": 576, "input_size": None, "qk_norm": "rms",
                    "context_embedder_config": {"target": "torch.nn.Linear",
                                                "params": {"in_features": 40, "out_features": 128}}}),
}  # fmt: skip


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module, seed=0):
    """Give a module weights that keep activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted([*module.named_parameters(), *module.named_buffers()]):
            if parameter.ndim >= 2:
                random = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(random * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(1)
    return module


def load(name, disable_dynamic=False):
    """Return a model patcher that can be copied as those of ComfyUI's loaders can."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import folder_paths

    if name not in CONFIGS:
        path = folder_paths.get_full_path("diffusion_models", f"linearize_tiny_{name}.safetensors")
        return comfy.sd.load_diffusion_model(path, disable_dynamic=disable_dynamic)
    kind, numbers = CONFIGS[name]
    config = getattr(comfy.supported_models, kind)(dict(numbers))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    fill(model.diffusion_model)
    patcher = comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))
    patcher.cached_patcher_init = (load, (name,))
    return patcher


class Vae:
    """Stands in for an autoencoder that a ControlNet has its picture read by."""

    def __init__(self, scale=1.0):
        self.first_stage_model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.first_stage_model.weight, scale)

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return self.first_stage_model.weight.detach() * small.repeat(1, 6, 1, 1)[:, :16]


def control_net(kind, seed=5):
    """Return a ControlNet as ComfyUI's loader makes it: of FLUX without an autoencoder, of SD 3 with one."""
    import comfy.cldm.mmdit
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ldm.flux.controlnet
    import comfy.ops

    where = {"operations": comfy.ops.manual_cast, "device": "cpu", "dtype": torch.float32}
    more: dict[str, Any] = {"load_device": torch.device("cpu")}
    if kind == "flux":
        net = comfy.ldm.flux.controlnet.ControlNetFlux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=256,
            mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
            patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[], **where,
        )  # fmt: skip
        more |= {"extra_conds": ["y", "guidance"]}
    else:
        net = comfy.cldm.mmdit.ControlNet(num_blocks=1, **CONFIGS["sd3"][1], **where)
        more |= {"compression_ratio": 1, "latent_format": comfy.latent_formats.SD3()}
    return comfy.controlnet.ControlNet(fill(net, seed), **more)


def controlled(entries, net, seed, strength=0.7, percents=(0.0, 1.0), vae=None):
    """Return conditionings with a ControlNet, as ComfyUI's node Apply ControlNet gives them."""
    import nodes

    picture = noise(seed, 1, 40, 56, 3).sigmoid()
    return nodes.ControlNetApplyAdvanced().apply_controlnet(*entries, net, picture, strength, *percents, vae=vae)


def text(seed, width, pooled=None, tokens=7, **options):
    more = {} if pooled is None else {"pooled_output": noise(seed + 1, 1, pooled)}
    return [[noise(seed, 1, tokens, width), {**more, **options}]]


def kontext(seed):
    """FLUX.1 Kontext: two references of other sizes than the picture."""
    references = {"reference_latents": [noise(seed + 2, 1, 16, 6, 10), noise(seed + 3, 1, 16, 4, 6)],
                  "reference_latents_method": "index"}  # fmt: skip
    return text(seed, 64, 32, **references), text(seed + 9, 64, 32)


def qwen_edit(seed):
    """Qwen-Image-Edit: positive and negative have the picture that is edited."""
    options = {"reference_latents": [noise(seed + 2, 1, 16, 1, 6, 9)]}
    return text(seed, 24, **options), text(seed + 9, 24, **options)


def vace(seed):
    """Wan VACE: control frames, their masks and strengths, on both sides."""
    frames, mask = noise(seed + 2, 1, 32, 2, 6, 8), noise(seed + 3, 1, 64, 2, 6, 8).sigmoid()
    options = {"vace_frames": [frames], "vace_mask": [mask], "vace_strength": [0.8]}
    return text(seed, 4096, **options), text(seed + 9, 4096, **options)


def image_to_video(seed):
    """Wan I2V: a first frame, its mask, and what an encoder of pictures saw."""
    import comfy.clip_vision

    seen = comfy.clip_vision.Output()
    seen["penultimate_hidden_states"], seen["image_embeds"] = noise(seed + 4, 1, 5, 1280), None
    options = {"concat_latent_image": noise(seed + 2, 1, 16, 2, 6, 8), "concat_mask": torch.ones(1, 1, 2, 6, 8),
               "clip_vision_output": seen}  # fmt: skip
    options["concat_mask"][:, :, :1] = 0
    return text(seed, 4096, **options), text(seed + 9, 4096, **options)


def flux_control(seed, net):
    """FLUX.1 with a ControlNet in part of sampling, on top of another."""
    first = controlled((text(seed, 64, 32), text(seed + 9, 64, 32)), net, seed + 2, percents=(0.0, 0.9))
    return controlled(first, net, seed + 3, strength=0.4)


def sd3_control(seed, net):
    """Stable Diffusion 3 with a ControlNet that reads its picture through an autoencoder."""
    return controlled((text(seed, 40, 32), text(seed + 9, 40, 32)), net, seed + 2, vae=Vae())


@dataclass(frozen=True)
class Edit:
    """An edit or control model: its weights, the size of its latents, what makes positive and negative of a seed."""

    model: str
    size: tuple[int, ...]
    condition: Any
    net: str = ""


EDITS = {
    "kontext": Edit("flux", (1, 16, 10, 14), kontext),
    "qwen edit": Edit("qwen", (1, 16, 1, 6, 10), qwen_edit),
    "vace": Edit("vace", (1, 16, 2, 6, 8), vace),
    "wan i2v": Edit("wan_i2v", (1, 16, 2, 6, 8), image_to_video),
    "flux control": Edit("flux", (1, 16, 10, 14), flux_control, "flux"),
    "sd3 control": Edit("sd3", (1, 16, 10, 14), sd3_control, "sd3"),
}
