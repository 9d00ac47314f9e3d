"""Bases that ComfyUI casts on the fly: the layout and the windows do not care how weights are stored."""

import pytest
import torch


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_an_fp8_base(comfy, studio, everywhere, dtype):
    with torch.inference_mode():
        (model,) = comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", dtype)
    assert "float8" in str(model.get_model_object("diffusion_model").img_in.weight.dtype)
    dense = studio.sample(model)
    patched = studio.clear(model, radius=100)
    assert (studio.sample(patched) - dense).abs().max() < 1e-3
    assert studio.ran(patched) == everywhere
    small = studio.clear(model, radius=2)
    assert (studio.sample(small) - dense).abs().max() > 1e-2
    assert studio.ran(small) == everywhere
