"""What stands in for downloads: encoders, pictures and sound of a family, and the nodes that give them."""

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from families import default_operations, noise, seeded
from template_models import Tiny
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 9, 128, 192  # of pictures and videos, in pixels
LARGEST = 512  # pixels of a side beyond which the autoencoder takes a picture smaller, as WIDTH


class TextEncoder:
    """Gives random text of the family's width, longer for longer prompts."""

    patcher = None

    def __init__(self, family: Tiny) -> None:
        self.family = family
        self.cond_stage_model = self

    def clone(self, **_: Any) -> "TextEncoder":
        return self

    def set_tokenizer_option(self, *_: Any) -> None:
        """Options of a tokenizer change no shape here."""

    def clip_layer(self, _: int) -> None:
        """All layers are alike."""

    def tokenize(self, text: str, **_: Any) -> dict[str, str]:
        return dict.fromkeys(("l", "g", "t5xxl", "llama"), str(text))

    def encode_from_tokens(self, tokens: dict[str, str], return_pooled: bool = False, return_dict: bool = False) -> Any:
        text, extra = self.encode(tokens)
        if return_dict:
            return {"cond": text, **extra}
        return (text, extra.get("pooled_output")) if return_pooled else text

    def encode_from_tokens_scheduled(self, tokens: dict[str, str], add_dict: dict | None = None, **_: Any) -> list:
        text, extra = self.encode(tokens)
        return [[text, {**extra, **(add_dict or {})}]]

    def encode(self, tokens: dict[str, str]) -> tuple[Tensor, dict[str, Any]]:
        length = len(tokens["l"])
        text = noise(1, 5 + length % 4, self.family.width, seed=length)
        extra = self.family.extra(text)
        if self.family.pooled:
            extra["pooled_output"] = noise(1, self.family.pooled, seed=1)
        return text, extra


class Autoencoder:
    """Gives random latents of the shape that the family's own would give."""

    device = torch.device("cpu")
    vae_dtype = torch.float32

    def __init__(self, latent_format: Any) -> None:
        import comfy.model_patcher

        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Module(), self.device, self.device)
        self.latent_channels = latent_format.latent_channels
        self.side = latent_format.spacial_downscale_ratio
        self.step = latent_format.temporal_downscale_ratio
        self.latent_dim = latent_format.latent_dimensions
        self.downscale_ratio = (
            lambda frames: max(0, math.floor((frames + self.step - 1) / self.step)),
            self.side,
            self.side,
        )
        self.upscale_ratio = (lambda frames: max(0, frames * self.step - self.step + 1), self.side, self.side)
        self.downscale_index_formula = self.upscale_index_formula = (self.step, self.side, self.side)
        if self.latent_dim == 2:
            self.downscale_ratio = self.upscale_ratio = self.side

    def spacial_compression_encode(self) -> int:
        return self.side

    spacial_compression_decode = spacial_compression_encode

    def temporal_compression_decode(self) -> int | None:
        return self.step if self.latent_dim == 3 else None

    def throw_exception_if_invalid(self) -> None:
        """Weights are not needed."""

    def encode(self, pixels: Tensor) -> Tensor:
        count, height, width = pixels.shape[-4:-1] if pixels.ndim > 3 else (1, *pixels.shape[:2])
        smaller = round(max(height, width) / WIDTH) if max(height, width) > LARGEST else 1
        size = (height // smaller // self.side, width // smaller // self.side)
        if self.latent_dim == 3:
            return noise(1, self.latent_channels, (count - 1) // self.step + 1, *size, seed=4)
        return noise(count, self.latent_channels, *size, seed=4)

    def encode_tiled(self, pixels: Tensor, **_: Any) -> Tensor:
        return self.encode(pixels)

    def decode(self, latent: Tensor) -> Tensor:
        height, width = latent.shape[-2] * self.side, latent.shape[-1] * self.side
        frames = (latent.shape[2] - 1) * self.step + 1 if latent.ndim == 5 else latent.shape[0]
        picture = torch.rand(frames, min(height, HEIGHT), min(width, WIDTH), 3)
        return picture.unsqueeze(0) if latent.ndim == 5 else picture

    def decode_tiled(self, latent: Tensor, **_: Any) -> Tensor:
        return self.decode(latent)


class SoundAutoencoder:
    """LTX-2's and MiniMax H3's: latents of sound."""

    audio_sample_rate = 32000

    def __init__(self, channels: int, bins: int) -> None:
        self.latent_channels, self.bins = channels, bins
        self.first_stage_model = SimpleNamespace(
            latent_frequency_bins=bins,
            output_sample_rate=24000,
            num_of_latents_from_frames=lambda frames, rate: max(1, round(frames / rate * 25)),
        )

    def encode(self, waveform: Tensor) -> Tensor:
        shape = (7, self.bins) if self.bins > 2 else (self.bins, 7)
        return noise(1, self.latent_channels, *shape, seed=6)


class ImageEncoder:
    """Gives random features of the width that the family's model takes."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        import comfy.clip_vision

        output = comfy.clip_vision.Output()
        output["last_hidden_state"] = output["penultimate_hidden_states"] = noise(1, 257, self.width, seed=5)
        output["all_hidden_states"] = noise(1, 27, 257, self.width, seed=5)
        output["image_embeds"], output["mm_projected"] = noise(1, self.width, seed=5), None
        output["image_sizes"] = [(3, 256, 256)]
        return output


class StyleModel:
    """FLUX.1's Redux: tokens of a picture's style, of the width of text."""

    def __init__(self, width: int) -> None:
        self.width = width

    def get_cond(self, _: Any) -> Tensor:
        return noise(1, 11, self.width, seed=8)


def control_net() -> Any:
    """Return a control that ComfyUI takes for one, and that adds nothing."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def copy(self) -> Any:
            copied = Control()
            self.copy_to(copied)
            return copied

        def get_control(self, x_noisy: Tensor, *_: Any) -> dict[str, list]:
            return {"input": [], "middle": [], "output": []}

        def get_models(self) -> list:
            return []

    return Control()


def model_patch(family: Tiny) -> Any:
    """Return the tiny control of a family, of ComfyUI's own class, as its loader returns it."""
    import comfy.model_patcher
    from comfy.ldm.lumina.controlnet import ZImage_Control
    from comfy_extras import nodes_model_patch

    if "qwen" in family.files:
        sizes = {"num_layers": 2, "in_dim": 64, "dim": 32}
        model = nodes_model_patch.QwenImageBlockWiseControlNet(**sizes, **default_operations())
    elif "z_image" in family.files:
        sizes = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "n_control_layers": 1}
        sizes |= {"additional_in_dim": 17, "refiner_control": True}  # as version 2.1 has them
        model = ZImage_Control(**sizes, **default_operations())
    else:
        sizes = {"intermediate_dim": 8, "in_dim": 160, "num_layers": 2}  # its 40 heads divide this
        operations = {key: each for key, each in default_operations().items() if key != "dtype"}
        model = nodes_model_patch.MultiTalkModelPatch(**sizes, **operations)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(seeded(model), cpu, cpu)


def sound() -> dict[str, Any]:
    """Return two seconds of sound."""
    return {"waveform": noise(1, 2, 32000, seed=7) * 0.1, "sample_rate": 16000}


def video() -> Any:
    """Return a video with sound."""
    from comfy_api.latest import InputImpl, Types

    images = torch.rand(FRAMES, HEIGHT, WIDTH, 3)
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=sound(), frame_rate=Fraction(16)))


def encoded_sound(number: int, channels: int) -> dict[str, Any]:
    """Return what an encoder of sound gives of two seconds, its layers."""
    layers = [noise(1, 100, channels, seed=n) for n in range(number)]
    return {"encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": 32000}


def given(family: Tiny, latent_format: Any) -> dict[str, Callable[..., Any]]:
    """Return what stands in for an output of each type."""
    import comfy.latent_formats

    audio = (8, 16)
    if "minimax" in family.files:  # its format is that of the sound
        audio, latent_format = (32, 2), comfy.latent_formats.MiniMaxH3Video()
    return {
        "CLIP": lambda: TextEncoder(family),
        "VAE": lambda: Autoencoder(latent_format),
        "AUDIO_VAE": lambda: SoundAutoencoder(*audio),
        "CLIP_VISION": lambda: ImageEncoder(family.vision),
        "STYLE_MODEL": lambda: StyleModel(family.width),
        "CONTROL_NET": control_net,
        "IMAGE": lambda: torch.rand(1, HEIGHT, WIDTH, 3),
        "MASK": lambda: (torch.rand(1, HEIGHT, WIDTH) > 0.5).float(),
        "VIDEO": video,
        "AUDIO": sound,
        "AUDIO_ENCODER_OUTPUT": lambda: encoded_sound(*family.sound),
        "LATENT": lambda: {"samples": noise(1, latent_format.latent_channels, 3, HEIGHT // 8, WIDTH // 8, seed=9)},
        "MODEL_PATCH": lambda: model_patch(family),
        "STRING": lambda: "a lake below mountains",
        "INT": lambda: 1,
        "FLOAT": lambda: 1.0,
    }


class Given:
    """Gives what stands in for an output of a type."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "give", "tests"
    sources: dict[str, Callable[..., Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"kind": ("STRING", {})}}

    def give(self, kind: str) -> tuple:
        return (self.sources[kind](),)


class GivenModel(Given):
    """Gives the tiny model that stands in for a file."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"file": ("STRING", {})}}

    def give(self, file: str) -> tuple:
        return (self.sources["MODEL"](file),)


class GivenLoRA(Given):
    """Changes one weight, as a LoRA does."""

    RETURN_TYPES = ("MODEL", "CLIP")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",)}, "optional": {"clip": ("CLIP",), "strength_model": ("FLOAT", {})}}

    def give(self, model: Any, clip: Any = None, strength_model: float = 1.0) -> tuple:
        patched = model.clone()
        name, weight = next((name, each) for name, each in model.model.named_parameters() if each.ndim == 2)
        patched.add_patches({name: ("diff", (torch.full_like(weight, 1e-3),))}, strength_model)
        return patched, clip


class AtMost(Given):
    """Gives a number, or the limit where it is larger."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": ("*",), "limit": ("*",)}}

    def give(self, value: float, limit: float) -> tuple:
        return (min(value, limit),)


class FewSteps(Given):
    """Gives the first, middle and last of the noise levels."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"sigmas": ("SIGMAS",)}}

    def give(self, sigmas: Tensor) -> tuple:
        last = len(sigmas) - 1
        return (sigmas[sorted({0, last // 2, last})],)


NODES = (Given, GivenModel, GivenLoRA, AtMost, FewSteps)
