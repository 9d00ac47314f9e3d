"""What tells models apart for a job: names of whatever nodes changed beside the weights."""

import pytest
import torch


@pytest.fixture(scope="module")
def tiny(comfy):
    """The tiny FLUX as its loader gives it."""
    with torch.inference_mode():
        return comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", "default")[0]


class Key:
    """What ComfyUI names hooks by."""


def function(*_):
    return None


def set_tensor(model):
    model.model_options["transformer_options"]["lengths"] = torch.zeros(3)


def set_hook(model):
    model.hook_patches = {Key(): {"diffusion_model.img_in.weight": [function]}}


CHANGES = {
    "object patch": (lambda model: model.add_object_patch("extra", function), "object_patches/extra"),
    "model function": (lambda model: model.set_model_unet_function_wrapper(function), "model_function_wrapper"),
    "option": (lambda model: model.set_model_denoise_mask_function(function), "denoise_mask_function"),
    "tensor": (set_tensor, "transformer_options/lengths"),
    "injection": (lambda model: model.set_injections("pack", [function]), "injections/pack"),
    "weight wrapper": (lambda model: model.add_weight_wrapper("a.weight", function), "weight_wrapper_patches/a.weight"),
    "hook": (set_hook, "hook_patches/Key/diffusion_model.img_in.weight"),
    "wrapper": (lambda model: model.add_wrapper_with_key("apply", "a", function), "wrappers/apply/a"),
    "other pack": (lambda model: model.add_wrapper_with_key("apply", "b", function), "wrappers/apply/b"),
    "patch": (lambda model: model.set_model_attn1_patch(function), "transformer_options/patches/attn1_patch"),
    "one block": (
        lambda model: model.set_model_patch_replace(function, "dit", "double_block", 0),
        "transformer_options/patches_replace/dit/('double_block', 0)",
    ),
    "another": (
        lambda model: model.set_model_patch_replace(function, "dit", "double_block", 1),
        "transformer_options/patches_replace/dit/('double_block', 1)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_of_a_model_is_named(comfy, tiny, name):
    patch, identity = comfy.module("patching.patcher"), comfy.module("training.comfyui.identity")
    change, expected = CHANGES[name]
    changed = tiny.clone()
    change(changed)
    assert patch.change_names(tiny) == [] and patch.is_as_loaded(tiny)
    assert patch.change_names(changed) == [expected] and not patch.is_as_loaded(changed)
    assert identity.job_digest(changed) != identity.job_digest(tiny)


def test_what_was_taken_back_is_no_change(comfy, tiny):
    patch, changed = comfy.module("patching.patcher"), tiny.clone()
    changed.add_wrapper_with_key("apply", "a", function)
    changed.remove_wrappers_with_key("apply", "a")
    changed.set_injections("pack", [])
    changed.model_options["transformer_options"]["patches"] = {"attn1_patch": []}
    assert patch.change_names(changed) == [] and patch.is_as_loaded(changed)
