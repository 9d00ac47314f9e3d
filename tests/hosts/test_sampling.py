"""Tiny models in ComfyUI's own model classes, patched by the node and run by its sampler with CFG."""

import pytest
import torch
from families import collect, noise

SAMPLED = {  # by family: ComfyUI's configuration and model class
    "flux2": ("Flux2", "Flux2"),
    "qwen_image": ("QwenImage", "QwenImage"),
    "z_image": ("ZImage", "Lumina2"),
    "hunyuan_video": ("HunyuanVideo", "HunyuanVideo"),
    "kandinsky5": ("Kandinsky5", "Kandinsky5"),
    "krea2": ("Krea2", "Krea2"),
    "lens": ("Lens", "Lens"),
}
FAMILIES = {family.name: family for family in collect()}


@pytest.fixture
def patcher(comfy, tiny):
    """A function: the model patcher of a family's tiny model, as a loader would return it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    def make(name):
        config_class, model_class = SAMPLED[name]
        config = getattr(comfy.supported_models, config_class)({"disable_unet_model_creation": True, "hidden_size": 32})
        model = getattr(comfy.model_base, model_class)(config)
        model.diffusion_model = tiny(FAMILIES[name])
        model.get_dtype = model.get_dtype_inference = lambda: torch.float32
        model.process_latent_in = model.process_latent_out = lambda latent: latent  # its channels are another number
        model.concat_cond = lambda **_: None
        model.memory_usage_factor_conds = ()
        return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

    return make


@pytest.mark.parametrize("name", SAMPLED)
def test_every_site_runs_in_the_real_sampler(name, comfy, patcher):
    """Prompts of different lengths cannot share a batch; FLUX.2's are padded to one length, and share it."""
    from comfy.sample import sample

    family = FAMILIES[name]
    inputs = family.inputs(family.cases["plain"])

    def condition(seed, tokens):
        mask = {"attention_mask": torch.ones(1, tokens, dtype=torch.long)} if name == "lens" else {}
        text = noise(1, tokens, inputs.text.shape[2], seed=seed)
        return [[text, {"pooled_output": torch.zeros(1, 12), **mask}]]

    patched = comfy.node("LinearizeCLEAR")(model=patcher(name), radius=2)[0]
    latent = torch.zeros_like(inputs.latent)
    with torch.inference_mode():
        result = sample(
            patched, inputs.latent, 2, 3.0, "euler", "simple", condition(1, 5), condition(2, 7), latent, seed=3
        )
    record = comfy.module("nodes.patching").runtime_of(patched).record
    assert torch.isfinite(result).all() and not torch.equal(result, latent)
    assert {(ran.site, ran.kind) for ran in record.ran} == {(site, "clear") for site in family.sites}
    assert set(record.ran.values()) == {2 if name == "flux2" else 4} and not record.declined
