"""Copies of the tiny models whose projections are stored packed: by ComfyUI's own formats, and as a GGUF pack does.

The GGUF stand-in has the habits of ComfyUI-GGUF that others meet: weights are a tensor subclass that holds bytes and
tells the shape of what they mean, layers dequantise and patch in their forward, and the state dict holds empty tensors.
"""

import json
from pathlib import Path

import torch

BLOCK = 32  # weights of one scale
FORMATS = ("float8_e4m3fn", "nvfp4", "convrot_w4a4")  # of ComfyUI's own


def is_packed(name: str, value: torch.Tensor) -> bool:
    """Return whether a weight is stored packed: the matrices inside of blocks."""
    return name.endswith(".weight") and value.ndim == 2 and "block" in name and min(value.shape) >= 64


def write_packed(source: Path, path: Path, kind: str) -> None:
    """Write a copy of a checkpoint in one of ComfyUI's formats."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    from safetensors.torch import load_file, save_file

    packed = {}
    for name, value in load_file(source).items():
        if is_packed(name, value):
            layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
            packed |= QuantizedTensor.from_float(value, layout).state_dict(name)
            conf = json.dumps({"format": kind}).encode()
            packed[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        else:
            packed[name] = value
    save_file({name: value.contiguous() for name, value in packed.items()}, path)


class Packed(torch.Tensor):
    """Rows of blocks: a scale in fp16 and 32 numbers of 8 bits. `shape` counts the numbers, `size()` the bytes."""

    tensor_type: str
    tensor_shape: torch.Size
    patches: list

    @staticmethod
    def of(data: torch.Tensor, tensor_type: str, shape: torch.Size) -> "Packed":
        found = data.as_subclass(Packed)
        found.tensor_type, found.tensor_shape, found.patches = tensor_type, shape, []
        return found

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())

    def to(self, *args, **kwargs):
        found = super().to(*args, **kwargs)
        found.tensor_type, found.tensor_shape = getattr(self, "tensor_type", None), self.shape
        found.patches = list(getattr(self, "patches", []))
        return found

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self


def pack(value: torch.Tensor) -> Packed:
    """Return a matrix in 8 bits."""
    rows = value.float().reshape(value.shape[0], -1, BLOCK)
    scale = (rows.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (rows / scale.float().clamp_min(1e-12)).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], -1).flatten(1)
    return Packed.of(data, "Q8_0", value.shape)


def is_quantised(value: torch.Tensor) -> bool:
    """Return whether a tensor holds bytes that have to be unpacked."""
    return getattr(value, "tensor_type", None) not in (None, "F32")


def unpack(value: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor that may be packed."""
    plain = value.as_subclass(torch.Tensor)
    if not is_quantised(value):
        return plain
    blocks = plain.reshape(plain.size(0), -1, BLOCK + 2)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * scale).reshape(value.shape)


def gguf_model(source: Path):
    """Return the model patcher that a GGUF pack's loader makes of a checkpoint."""
    import comfy.lora
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    import comfy.utils
    from safetensors.torch import load_file

    class Linear(comfy.ops.manual_cast.Linear):
        comfy_cast_weights = True

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *_):
            for part in ("weight", "bias"):
                if prefix + part in state_dict:
                    setattr(self, part, torch.nn.Parameter(state_dict[prefix + part], requires_grad=False))

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            if not is_quantised(self.weight):
                return super()._save_to_state_dict(destination, prefix, keep_vars)
            for name, value in (("weight", self.weight), ("bias", self.bias)):
                if value is not None:
                    destination[prefix + name] = torch.zeros_like(value, device=torch.device("meta"))
            destination[prefix + "temp.weight"] = torch.empty(self.weight.shape, device=torch.device("meta"))
            return None

        def get_weight(self, tensor, dtype):
            if tensor is None:
                return None
            value = unpack(tensor).to(dtype)
            for patches, key in getattr(tensor, "patches", []):
                value = comfy.lora.calculate_weight(patches, value, key)
            return value

        def forward_comfy_cast_weights(self, input):
            weight, bias = (self.get_weight(each, input.dtype) for each in (self.weight, self.bias))
            return torch.nn.functional.linear(input, weight, bias)

    class Ops(comfy.ops.manual_cast):
        pass

    Ops.Linear = Linear

    class Patcher(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **kwargs):
            weight = comfy.utils.get_attr(self.model, key)
            if not is_quantised(weight):
                return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
            if key in self.patches:
                changed = weight.to(device_to)
                changed.patches = [(self.patches[key], key)]
                comfy.utils.set_attr_param(self.model, key, changed)
            return None

        def unpatch_model(self, device_to=None, unpatch_weights=True):
            for each in self.model.parameters() if unpatch_weights else ():
                if getattr(each, "patches", None):
                    each.patches = []
            return super().unpatch_model(device_to, unpatch_weights)

        def load(self, *args, force_patch_weights=False, **kwargs):
            return super().load(*args, force_patch_weights=True, **kwargs)

        def clone(self, *args, **kwargs):
            found = comfy.model_patcher.ModelPatcher.clone(self, *args, **kwargs)
            found.__class__ = Patcher
            return found

    tensors = {
        name: pack(value) if is_packed(name, value) else Packed.of(value, "F32", value.shape)
        for name, value in load_file(source).items()
    }
    model = comfy.sd.load_diffusion_model_state_dict(tensors, {"custom_operations": Ops}, disable_dynamic=True)
    return Patcher.clone(model)
