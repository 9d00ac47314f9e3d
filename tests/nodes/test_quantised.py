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


def comfy_sd():
    import comfy.sd

    return comfy.sd


def effective(model, key):
    """Return a weight as the layer computes with it, patches included."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    path, _, part = key.rpartition(".")
    layer = model.get_model_object(f"diffusion_model.{path}")
    value = getattr(layer, part)
    if hasattr(layer, "get_weight"):
        return layer.get_weight(value, torch.float32)
    return (value.dequantize() if hasattr(value, "dequantize") else value).float().detach()


def changes(seed=4):
    """Return a student's changes of every sort: low rank, a whole difference, a whole weight, a bias."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    low, whole, new, bias = (
        f"diffusion_model.{path}"
        for path in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear2", "double_blocks.1.img_attn.proj",
                     "double_blocks.0.txt_attn.proj")
    )  # fmt: skip
    return {
        f"{low}.lora_up.weight": random(768, 4), f"{low}.lora_down.weight": random(4, 256),
        f"{whole}.diff": random(256, 256 + 1024), f"{new}.set_weight": random(256, 256), f"{bias}.diff_b": random(256),
    }  # fmt: skip


QKV, BIAS = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.proj.bias"
COARSE = {
    "float8_e4m3fn": 0.05,
    "nvfp4": 0.25,
    "convrot_w4a4": 0.25,
    "gguf": 0.01,
}  # relative errors, rounding at random


def windows(comfy, deltas):
    """Return a student of windows everywhere with changes of weights."""
    candidates, spec = comfy.module("attention.students.candidates"), comfy.module("attention.specs").ClearSpec(3)
    sites = ("double.0", "double.1", "single.0", "single.1")
    found = {site: (candidates.Candidate(spec, float("nan")),) for site in sites}
    return candidates.Candidates("flux", found, deltas=deltas)


@pytest.mark.parametrize("kind", COARSE)
def test_a_student_changes_weights_that_are_stored_packed(comfy, studio, everywhere, packed_base, kind, relative_error):
    model, deltas = packed_base(kind), changes()
    before = {key: effective(model, key).clone() for key in (QKV, BIAS, "single_blocks.1.linear2.weight")}
    student = windows(comfy, deltas)
    patched = comfy.node("LinearizeApply")(model=model, attention=student)[0]
    prefix = "diffusion_model."
    low = deltas[f"{prefix}double_blocks.0.img_attn.qkv.lora_up.weight"] @ deltas[
        f"{prefix}double_blocks.0.img_attn.qkv.lora_down.weight"]  # fmt: skip
    expected = {
        QKV: before[QKV] + low,
        BIAS: before[BIAS] + deltas[f"{prefix}double_blocks.0.txt_attn.proj.diff_b"],
        "single_blocks.1.linear2.weight": before["single_blocks.1.linear2.weight"] + deltas[
            f"{prefix}single_blocks.1.linear2.diff"],
        "double_blocks.1.img_attn.proj.weight": deltas[f"{prefix}double_blocks.1.img_attn.proj.set_weight"],
    }  # fmt: skip
    for key, value in expected.items():
        assert relative_error(effective(patched, key), value) < COARSE[kind], key
    assert studio.sample(patched).isfinite().all()
    assert studio.ran(patched) == everywhere
    assert relative_error(effective(model, QKV), before[QKV]) < 1e-6


@pytest.mark.parametrize("kind", COARSE)
def test_a_change_of_another_shape_is_told_in_shapes_of_numbers(comfy, packed_base, kind):
    name = "diffusion_model.double_blocks.0.img_attn.qkv.diff"
    student = windows(comfy, {name: torch.zeros(768, 128)})
    with pytest.raises(ValueError, match=r"\(768, 128\), which does not fit this model's \(768, 256\)"):
        comfy.node("LinearizeApply")(model=packed_base(kind), attention=student)


@pytest.mark.parametrize("kind", COARSE)
def test_base_weights_are_read_as_numbers(comfy, studio, packed_base, kind, relative_error):
    """Also while the model is loaded with a patch on them: a fingerprint may be made of any weight."""
    patch = comfy.module("patching.patcher")
    model = packed_base(kind).clone()
    for key in (QKV, BIAS):
        model.add_patches({f"diffusion_model.{key}": ("diff", (torch.ones(effective(model, key).shape),))})
    changed = effective(model, QKV)
    for key in (QKV, BIAS, "double_blocks.0.img_attn.norm.query_norm.weight"):
        found, expected = patch.parameter(model, key), patch.parameter(studio.model, key)
        assert relative_error(found, expected) < COARSE[kind], key
        assert not found.is_inference() or torch.is_inference_mode_enabled()
    assert relative_error(changed, patch.parameter(model, QKV)) > 0.5, "the model was not patched"
