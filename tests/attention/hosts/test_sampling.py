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
    "wan": ("WAN21_T2V", "WAN21"),
    "sd3.5 medium": ("SD3", "SD3"),
    "ltx": ("LTXV", "LTXV"),
    "hidream": ("HiDream", "HiDream"),
    "cosmos predict2": ("CosmosT2IPredict2", "CosmosPredict2"),
    "cosmos 1": ("CosmosT2V", "CosmosVideo"),
    "cogvideox": ("CogVideoX_T2V", "CogVideoX"),
    "auraflow": ("AuraFlow", "AuraFlow"),
    "mochi": ("GenmoMochi", "GenmoMochi"),
    "omnigen2": ("Omnigen2", "Omnigen2"),
    "boogu": ("Boogu", "Boogu"),
    "ideogram4": ("Ideogram4", "Ideogram4"),
    "pixeldit": ("PixelDiTT2I", "PixelDiTT2I"),
}
MASKED = ("lens", "ltx", "mochi", "omnigen2", "boogu")  # their text encoders give a mask
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
        mask = {"attention_mask": torch.ones(1, tokens, dtype=torch.long)} if name in MASKED else {}
        if name == "hidream":
            mask["conditioning_llama3"] = noise(1, 3, tokens, 24, seed=seed)
        text = noise(1, tokens, inputs.text.shape[2], seed=seed)
        return [[text, {"pooled_output": torch.zeros(1, 12), **mask}]]

    patched = comfy.node("LinearizeCLEAR")(model=patcher(name), radius=2)[0]
    latent = torch.zeros_like(inputs.latent)
    with torch.inference_mode():
        result = sample(
            patched, inputs.latent, 2, 3.0, "euler", "simple", condition(1, 5), condition(2, 7), latent, seed=3
        )
    record = comfy.module("patching").runtime_of(patched).record
    assert torch.isfinite(result).all() and not torch.equal(result, latent)
    assert {(ran.site, ran.kind) for ran in record.ran} == {(site, "clear") for site in family.sites}
    assert set(record.ran.values()) == {2 if name == "flux2" else 4} and not record.declined


@pytest.mark.parametrize(
    ("name", "config", "sound", "width"),
    [("ltx 2", ("LTXAV", "LTXAV"), (1, 8, 6, 16), 32), ("minimax h3", ("MiniMaxH3", "MiniMaxH3"), (1, 8, 2, 6), 16)],
)
def test_video_with_sound(name, config, sound, width, comfy, patcher, monkeypatch):
    """Both come in one nested latent; a wished backend is asked about the video."""
    from comfy.nested_tensor import NestedTensor
    from comfy.sample import prepare_noise, sample

    monkeypatch.setitem(SAMPLED, name, config)
    family = FAMILIES[name]
    video = torch.zeros_like(family.inputs(family.cases["plain"]).latent)
    model = patcher(name)
    # a refiner for text of other widths
    monkeypatch.setattr(model.model.diffusion_model, "preprocess_text_embeds", lambda text, **_: text)
    patched = comfy.node("LinearizeCLEAR")(model=model, radius=2, backend="torch")[0]
    latent = NestedTensor((video, torch.zeros(sound)))
    texts = [[[noise(1, tokens, width, seed=tokens), {}]] for tokens in (5, 7)]
    with torch.inference_mode():
        result = sample(patched, prepare_noise(latent, 3), 2, 3.0, "euler", "simple", *texts, latent, seed=3)
    record = comfy.module("patching").runtime_of(patched).record
    assert all(torch.isfinite(part).all() for part in result.unbind())
    assert {(ran.site, ran.kind) for ran in record.ran} == {(site, "clear") for site in family.sites}
    assert set(record.ran.values()) == {4} and not record.declined
