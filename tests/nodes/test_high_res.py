"""High-Resolution FLUX: noise levels, stretched positions, the proportional scale before and behind CLEAR Attention."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROPE = "diffusion_model.pe_embedder"
PAPER = [0.875, 0.848, 0.818, 0.786, 0.75, 0.711, 0.667, 0.618, 0.563, 0.5, 0.429, 0.346, 0.25, 0.136, 0]


@pytest.fixture
def high_res(comfy):
    """Run the node; return the model and the noise levels."""
    return lambda model, **inputs: comfy.node("LinearizeHighRes")(model=model, **inputs).args


@pytest.fixture
def shown(comfy, monkeypatch):
    """The texts that nodes show."""
    texts = []
    monkeypatch.setattr(comfy.module("nodes.node_status"), "show_on_node", lambda *_: texts.append)
    return texts


def test_the_noise_levels_are_the_papers(high_res, studio):
    _, sigmas = high_res(studio.model)
    assert sigmas.tolist() == pytest.approx(PAPER, abs=5.1e-4) and sigmas.dtype == torch.float32


def rotation(ids, base, axes=(16, 56, 56)):
    """FLUX's rotary embedding from its formula, in numpy: angle = position / base^(2 i / dim)."""
    angles = np.concatenate(
        [ids[..., axis, None] / base ** (np.arange(0, dim, 2) / dim) for axis, dim in enumerate(axes)], axis=-1
    )
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)[:, None]


def picture_ids(rows, columns, text):
    ids = np.zeros((1, text + rows * columns, 3))
    ids[0, text:, 1], ids[0, text:, 2] = np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)
    return ids


def test_the_rotary_base_is_multiplied_on_a_copy(studio, high_res):
    ids = picture_ids(8, 12, 5)
    before = studio.model.get_model_object(ROPE)
    patched, _ = high_res(studio.model)
    found = patched.get_model_object(ROPE)
    assert found is not before and found.theta == 100_000 and before.theta == 10_000
    assert np.abs(found(torch.tensor(ids)).numpy() - rotation(ids, 100_000.0)).max() < 1e-5
    assert np.abs(before(torch.tensor(ids)).numpy() - rotation(ids, 10_000.0)).max() < 1e-5
    again, _ = high_res(patched, ntk_factor=2.0)
    assert again.get_model_object(ROPE).theta == 200_000 and found.theta == 100_000
    unchanged, _ = high_res(studio.model, ntk_factor=1.0)
    assert torch.equal(unchanged.get_model_object(ROPE)(torch.tensor(ids)), before(torch.tensor(ids)))


def test_sampling_uses_the_base_and_gives_the_model_back(studio, high_res):
    seen = []

    def note(q, k, v, **kwargs):
        seen.append(kwargs["pe"].float().numpy())
        return {}

    def noting(model):
        noted = model.clone()
        noted.set_model_attn1_patch(note)
        return noted

    original, keys = studio.model.model.diffusion_model.pe_embedder, set(studio.model.object_patches)
    dense = studio.sample(studio.model)
    patched, _ = high_res(studio.model)
    stretched = studio.sample(noting(patched), steps=1)
    expected = rotation(picture_ids(8, 12, 12), 100_000.0)
    assert seen and all(np.abs(each - expected).max() < 1e-5 for each in seen)
    assert torch.isfinite(stretched).all()
    assert (studio.sample(patched) - dense).abs().max() > 1e-3
    seen.clear()
    studio.sample(noting(studio.model), steps=1)
    assert all(np.abs(each - rotation(picture_ids(8, 12, 12), 10_000.0)).max() < 1e-5 for each in seen)
    assert torch.equal(studio.sample(studio.model), dense), "the source model paints as before"
    assert set(studio.model.object_patches) == keys
    patched.patch_model()
    assert patched.model.diffusion_model.pe_embedder.theta == 100_000
    patched.unpatch_model()
    assert studio.model.model.diffusion_model.pe_embedder is original and original.theta == 10_000


def orders(studio, high_res, **clear):
    """CLEAR before High-Resolution FLUX, and behind it."""
    before = high_res(studio.clear(studio.model, **clear))[0]
    behind = studio.clear(high_res(studio.model)[0], **clear)
    return {"before": before, "behind": behind}


@pytest.mark.parametrize("order", ["before", "behind"])
def test_it_composes_with_clear_on_either_side(studio, high_res, everywhere, order):
    patched = orders(studio, high_res, radius=3, weights="none")[order]
    latent = studio.sample(patched)
    assert studio.ran(patched) == everywhere
    specs = {settings.spec for settings in studio.patching.runtime_of(patched).sites.values()}
    assert {(spec.radius, spec.proportional) for spec in specs} == {(3, True)}

    checked = orders(studio, high_res, radius=3, weights="none", backend="reference")[order]
    reference = studio.sample(checked)
    assert studio.ran(checked) == dict.fromkeys(everywhere, ("clear", "reference"))
    assert (latent - reference).abs().max() < 1e-4

    asked = studio.clear(studio.patching.set_rope_base(studio.model, 10), radius=3, weights="none", proportional=True)
    assert torch.equal(studio.sample(asked), latent)
    without = studio.clear(studio.patching.set_rope_base(studio.model, 10), radius=3, weights="none")
    assert (studio.sample(without) - latent).abs().max() > 1e-3, "the scale changes nothing"


def test_the_scale_that_ran_is_the_papers(studio, high_res, comfy, monkeypatch):
    """A disc over everything, with the paper's scale put on the queries of dense attention instead."""
    patched = high_res(studio.clear(studio.model, radius=100, weights="none"))[0]
    factor = math.sqrt(math.log(12 + 8 * 12, 4608))

    def scaled(func, q, k, v, heads, **kwargs):
        return func(q * factor, k, v, heads, **kwargs)

    dense = studio.patching.set_rope_base(studio.model, 10)
    dense.model_options["transformer_options"]["optimized_attention_override"] = scaled
    assert (studio.sample(patched) - studio.sample(dense)).abs().max() < 1e-5


def test_other_kinds_settings_and_the_source_stay(studio, high_res, comfy):
    first = studio.clear(studio.model, radius=3, weights="none", sites="single", min_tokens=7, end_percent=0.9)
    before = dict(studio.patching.runtime_of(first).sites)
    patched, _ = high_res(first)
    assert studio.patching.runtime_of(first).sites == before
    assert studio.patching.runtime_of(patched) is not studio.patching.runtime_of(first)
    assert set(studio.patching.runtime_of(patched).sites) == set(before)
    for settings in studio.patching.runtime_of(patched).sites.values():
        assert (settings.min_tokens, settings.percents) == (7, (0.0, 0.9))
    assert studio.patching.runtime_of(studio.clear(studio.model)).sites["single.0"].spec.proportional is False
    scale = comfy.module("attention.planning.high_res").with_proportional_scale
    specs = comfy.module("attention.specs")
    assert scale(specs.DenseSpec()) == specs.DenseSpec()
    split = specs.radius_per_head((4, 8))
    assert [group.spec.proportional for group in scale(split).groups] == [True, True]
    assert scale(split).num_heads == 2


def test_what_the_node_says(studio, high_res, shown):
    """1.073 is sqrt(log_4608(16640)): ComfyUI's 256 text tokens, where CLEAR has 512."""
    patched = studio.clear(studio.model, radius=16, weights="none")
    high_res(patched, width=2048, height=2048)
    assert "FLUX.1, 2048 x 2048: 16,640 tokens (256 global), 4 sites" in shown[-1]
    assert "clear radius 16 proportional True: 4 sites" in shown[-1] and "(7.3%)" in shown[-1]
    assert "14 of 20 steps, from sigma 0.875\nRoPE base 100,000\nproportional scale x 1.073" in shown[-1]
    assert "whole tokens" not in shown[-1]
    high_res(patched, width=1024, height=1024)
    assert "4,352 tokens: the proportional scale sharpens only above 4,608" in shown[-1]
    high_res(patched, width=2049, height=2048)
    assert "2049 x 2048 is not made of whole tokens of 16 pixels; use 2064 x 2048" in shown[-1]
    high_res(studio.model)
    assert "no site runs on clear, so attention keeps its scale" in shown[-1]


def test_pooled_windows_are_told_their_own_scale(studio, high_res, shown):
    high_res(studio.clear(studio.model, down_factor=4, weights="none"))
    assert "proportional scale x 1.194" in shown[-1]


def test_other_hosts_are_refused_in_one_sentence(studio, high_res, monkeypatch):
    other = SimpleNamespace(name="wan", title="Wan 2.1")
    monkeypatch.setattr(studio.patching, "host_of", lambda model: (other, None))
    with pytest.raises(ValueError, match=r"^this recipe is for FLUX.1, the model is Wan 2.1; leave High-Resolution"):
        high_res(studio.model)


def test_an_embedding_without_a_base_is_refused(studio, high_res):
    model = studio.model.clone()
    model.add_object_patch(ROPE, torch.nn.Identity())
    with pytest.raises(ValueError, match="position embedding has no base to stretch; take out the node"):
        high_res(model)


def test_its_costs_are_those_of_attention_report_matrices_included(comfy, studio, high_res, shown):
    specs, student = comfy.module("attention.specs"), comfy.module("attention.students.learned")
    host, module = studio.patching.host_of(studio.model)
    (site,) = (each for each in host.sites(module) if each.id == "single.0")
    matrices = torch.eye(site.head_dim).expand(site.num_heads, -1, -1)
    settings = {site.id: studio.runtime.SiteSettings(specs.ClearSpec(2))}
    parameters = student.StudentParameters({site.id: student.Learned(output=matrices)})
    model, _ = studio.patching.patch_model(studio.model, settings, parameters=parameters)
    patched, _ = high_res(model, width=512, height=512)
    report = comfy.node("LinearizeReport")(model=patched, width=512, height=512).args[0]
    (line,) = (each for each in report.splitlines() if each.startswith("attention per forward"))
    assert line in shown[0]
