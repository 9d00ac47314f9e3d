"""Write a FLUX checkpoint with random weights, small enough for a laptop, that ComfyUI's stock loader recognises.

Usage: python demo/tiny_flux.py FILE. Needs ComfyUI's code on the path named by LINEARIZE_COMFYUI. The picture it paints
is coloured noise: it proves the way through the server, not quality.
"""

import os
import sys
from pathlib import Path

SMALL = {  # 7 M parameters; ComfyUI derives heads and depths from shapes, the head dimension is always 128
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
    "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
    "txt_ids_dims": [],
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
    """Write the checkpoint and check that ComfyUI takes it for FLUX."""
    import comfy.model_detection
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux
    from safetensors.torch import save_file

    model = Flux(**SMALL, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    weights = random_weights(model.state_dict())
    found = type(comfy.model_detection.model_config_from_unet(weights, "")).__name__
    if not found.startswith("Flux"):
        raise SystemExit(f"ComfyUI takes this checkpoint for {found}, not for FLUX")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(weights, partial)
    partial.replace(path)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, os.environ["LINEARIZE_COMFYUI"])
    import comfy.options

    comfy.options.enable_args_parsing()
    write_tiny_flux(target)
