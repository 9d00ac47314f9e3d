"""CLEAR's published format through the node: against an independent computation, and beside LoRAs and other bases."""

import math
import re

import pytest
import torch

WIDTH, HEADS, DOUBLE, SINGLE = 256, 2, 2, 2
POOLED_SITES = (*(f"double.{i}" for i in range(DOUBLE)), *(f"single.{i}" for i in range(SINGLE)))


def published(pooled=1, seed=0, scale=0.06):
    """Return random tensors under the names and shapes of CLEAR's files, for the tiny model's sizes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape):
        tensors[name] = torch.randn(shape, generator=generator) * scale

    for kind, count in (("transformer_blocks", DOUBLE), ("single_transformer_blocks", SINGLE)):
        for i in range(count):
            parts = ["to_q", "to_k", "to_v"] + (["to_out.0"] if kind == "transformer_blocks" else [])
            for part in parts:
                add(f"{kind}.{i}.attn.{part}.weight", WIDTH, WIDTH)
                add(f"{kind}.{i}.attn.{part}.bias", WIDTH)
            if pooled > 1:
                name = f"{kind}.{i}.attn.processor.spatial_weight"
                shape = (1, 1, 1, pooled, 1, pooled, 1)
                tensors[name] = 1 / pooled**2 + 0.02 * torch.randn(shape, generator=generator)
    return tensors


def into_base(base, tensors, sites=POOLED_SITES):
    """Return the checkpoint `base` with the tensors written into its fused parameters, by hand."""
    result = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in tensors.items():
        kind, index, part, end = re.match(
            r"(single_)?transformer_blocks\.(\d+)\.attn\.(to_q|to_k|to_v|to_out)(?:\.0)?\.?(weight|bias)?", name
        ).groups() if "spatial" not in name else (None, None, None, None)  # fmt: skip
        if part is None or f"{'single' if kind else 'double'}.{index}" not in sites:
            continue
        if part == "to_out":
            result[f"double_blocks.{index}.img_attn.proj.{end}"] = tensor.clone()
            continue
        first = ("to_q", "to_k", "to_v").index(part) * WIDTH
        fused = f"single_blocks.{index}.linear1" if kind else f"double_blocks.{index}.img_attn.qkv"
        result[f"{fused}.{end}"][first : first + WIDTH] = tensor
    return result


def oracle(radius, tensors, text, rows, columns):
    """Return an override that computes CLEAR with plain loops over what each token sees."""
    tokens = text + rows * columns
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    sees[:text] = True
    sees[:, :text] = True
    for a in range(rows * columns):
        for b in range(rows * columns):
            distance = (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2
            sees[text + a, text + b] = distance < radius**2

    def override(func, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        kind = "single_transformer_blocks" if options["block_type"] == "single" else "transformer_blocks"
        weight = tensors.get(f"{kind}.{options['block_index']}.attn.processor.spatial_weight")
        mask, keys, values = sees, [k], [v]
        if weight is not None:
            d = weight.shape[3]
            mask = torch.cat([sees, torch.zeros(tokens, rows // d * (columns // d), dtype=torch.bool)], 1)
            mask[text:, tokens:] = True
            for source, parts in ((k, keys), (v, values)):
                planes = source[:, :, text:].reshape(*source.shape[:2], rows // d, d, columns // d, d, -1)
                parts.append((planes * weight).sum(dim=(3, 5)).flatten(2, 3))
        scores = q.double() @ torch.cat(keys, 2).double().transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        output = weights @ torch.cat(values, 2).double()
        return output.transpose(1, 2).flatten(2).to(q.dtype)

    return override


def load(comfy, name, dtype="default"):
    with torch.inference_mode():
        return comfy.nodes.UNETLoader().load_unet(name, dtype)[0]


def with_oracle(model, override):
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    return patched


@pytest.mark.parametrize("text", [256, 512])
@pytest.mark.parametrize("pooled", [1, 4], ids=["plain", "pooled"])
def test_a_published_file_equals_an_independent_computation(
    comfy, studio, everywhere, place, base_tensors, text, pooled
):
    tensors = published(pooled)
    named = {("transformer." if i % 2 else "module.transformer.") + k: v for i, (k, v) in enumerate(tensors.items())}
    named["transformer.proj_out.weight"] = torch.zeros(3)  # more than is needed
    suffix = f"_down_{pooled}" if pooled > 1 else ""
    name = place("linearize", f"clear_local_3{suffix}.safetensors", named)
    other = place("diffusion_models", "with_clear.safetensors", into_base(base_tensors, tensors))

    positive = studio.condition(tokens=text)
    expected = studio.sample(
        with_oracle(load(comfy, other), oracle(3, tensors, text, 8, 12)), size=(16, 24), positive=positive
    )
    patched = studio.clear(studio.model, radius=3, weights=name)
    found = studio.sample(patched, size=(16, 24), positive=positive)
    assert studio.ran(patched) == everywhere
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    untrained = studio.sample(studio.clear(studio.model, radius=3, weights="none"), size=(16, 24), positive=positive)
    assert (found - untrained).abs().max() > 1e-2


def lora(key, rank=4, seed=5):
    """Return a LoRA for one fused parameter and what it adds at strength 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"double_blocks.0.img_attn.qkv": 768, "single_blocks.1.linear1": 768 + 1024}[key]
    up, down = torch.randn(rows, rank, generator=generator) * 0.1, torch.randn(rank, WIDTH, generator=generator) * 0.1
    name = f"diffusion_model.{key}"
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, up @ down


def add_lora(model, tensors, strength):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def effective(model, key):
    """Return a parameter as the sampler uses it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    weight = model.get_model_object(f"diffusion_model.{key}")
    return weight.detach().float().clone()


@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_loras_before_and_after_survive(comfy, studio, everywhere, place, base_tensors, order, strength):
    tensors = published()
    name = place("linearize", "clear_local_3.safetensors", tensors)
    whole = into_base(base_tensors, tensors)
    model, expected = studio.model, dict(whole)
    for key, seed in (("double_blocks.0.img_attn.qkv", 5), ("single_blocks.1.linear1", 6)):
        if order in ("before", "both"):
            patch, delta = lora(key, seed=seed)
            model = add_lora(model, patch, strength)
            expected[f"{key}.weight"] = expected[f"{key}.weight"] + strength * delta
    patched = studio.clear(model, radius=3, weights=name)
    for key, seed in (("double_blocks.0.img_attn.qkv", 7), ("single_blocks.1.linear1", 8)):
        if order in ("after", "both"):
            patch, delta = lora(key, seed=seed)
            patched = add_lora(patched, patch, strength)
            expected[f"{key}.weight"] = expected[f"{key}.weight"] + strength * delta
    for key in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "double_blocks.1.img_attn.proj"):
        assert torch.allclose(effective(patched, f"{key}.weight"), expected[f"{key}.weight"], atol=1e-6), key
        assert torch.allclose(effective(patched, f"{key}.bias"), expected[f"{key}.bias"], atol=1e-6), key
    studio.sample(patched)
    assert studio.ran(patched) == everywhere


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
def test_unpatching_gives_the_base_back(comfy, studio, place, dtype):
    name = place("linearize", "clear_local_3.safetensors", published())
    model = load(comfy, "linearize_tiny_flux.safetensors", dtype)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    dense = studio.sample(model)
    patched = studio.clear(model, radius=100, weights=name)
    changed = studio.sample(patched)
    assert (changed - dense).abs().max() > 1e-2
    assert torch.equal(studio.sample(model), dense)
    patched.detach(), model.detach()
    after = model.model.state_dict()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_other_bases(comfy, studio, everywhere, place, base_tensors, dtype):
    """On a base of another dtype the weights are the published ones rounded to it, whatever the base held."""
    tensors = published()
    name = place("linearize", "clear_local_3.safetensors", tensors)
    base = place("diffusion_models", "cast.safetensors", {k: v.to(dtype) for k, v in base_tensors.items()})
    patched = studio.clear(load(comfy, base), radius=3, weights=name)
    picture = studio.sample(patched)
    assert picture.isfinite().all()
    assert studio.ran(patched) == everywhere
    found = effective(patched, "double_blocks.0.img_attn.qkv.weight")[:WIDTH]
    published_q = tensors["transformer_blocks.0.attn.to_q.weight"]
    relative = (found - published_q).norm() / published_q.norm()
    assert relative < {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float8_e4m3fn: 5e-2}[dtype]


def test_a_partial_load_computes_the_same(comfy, studio, everywhere, place, monkeypatch):
    """With little memory most modules get their patches when they are used, not when they are loaded."""
    from comfy.model_patcher import ModelPatcher

    name = place("linearize", "clear_local_3_down_4.safetensors", published(4))

    def build():
        model = add_lora(load(comfy, "linearize_tiny_flux.safetensors"), lora("double_blocks.0.img_attn.qkv")[0], 1.0)
        patched = studio.clear(model, radius=3, weights=name)
        return add_lora(patched, lora("double_blocks.0.img_attn.qkv", seed=9)[0], 0.5)

    expected = studio.sample(build())
    whole, patched_late = ModelPatcher.load, []

    def partly(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        result = whole(self, device_to, 200_000, force_patch_weights, False)
        patched_late.append(sum(bool(getattr(each, "weight_function", None)) for each in self.model.modules()))
        return result

    monkeypatch.setattr(ModelPatcher, "load", partly)
    model = build()
    assert (studio.sample(model) - expected).abs().max() < 1e-5
    assert max(patched_late) > 0, "everything was loaded whole, so this test shows nothing"
    assert studio.ran(model) == everywhere


def test_nothing_is_fetched_that_cannot_fit(studio, comfy, monkeypatch):
    files = comfy.module("nodes.model_files")
    monkeypatch.setattr(files, "_download", lambda *args, **kwargs: pytest.fail("the download began"))
    with pytest.raises(ValueError, match="distilled with down_factor 1, the node says 4"):
        studio.clear(studio.model, radius=32, down_factor=4, weights="clear_local_32.safetensors")
    with pytest.raises(ValueError, match="made for FLUX.1-dev, 3072 wide"):
        studio.clear(studio.model, radius=32, weights="clear_local_32.safetensors")
    monkeypatch.setattr(comfy.module("nodes.clear_source"), "PUBLISHED_WIDTH", WIDTH)
    with pytest.raises(ValueError, match=r"with 19 \+ 38 blocks; this model is 256 wide with 2 \+ 2 blocks"):
        studio.clear(studio.model, radius=32, weights="clear_local_32.safetensors")


def test_the_node_runs_again_when_its_file_comes_or_changes(comfy, place):
    cls = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeCLEAR"]
    before = cls.fingerprint_inputs(weights="auto", radius=8, down_factor=1)
    place("linearize", "clear_local_8.safetensors", published())
    after = cls.fingerprint_inputs(weights="auto", radius=8, down_factor=1)
    assert before != after == cls.fingerprint_inputs(weights="auto", radius=8, down_factor=1)
    assert cls.fingerprint_inputs(weights="auto", radius=9, down_factor=1)[1] == (0, 0)


def test_clones_and_sites_that_are_left_out(comfy, studio, place, base_tensors):
    tensors = published(4)
    name = place("linearize", "clear_local_3_down_4.safetensors", tensors)
    patched = studio.clear(studio.model, radius=3, weights=name, sites="single")
    runtime = studio.patching.runtime_of(patched.clone())
    assert set(runtime.sites) == {"single.0", "single.1"} == set(runtime.parameters.by_site())
    assert torch.equal(effective(patched, "double_blocks.0.img_attn.qkv.weight"), base_tensors[
        "double_blocks.0.img_attn.qkv.weight"
    ])  # fmt: skip
    assert torch.equal(
        effective(patched, "single_blocks.0.linear1.weight")[:WIDTH],
        tensors["single_transformer_blocks.0.attn.to_q.weight"],
    )


def test_a_later_node_takes_the_weights_of_its_sites_away(comfy, studio, place, base_tensors):
    first, second = published(4, seed=1), published(seed=2)
    one = place("linearize", "clear_local_3_down_4.safetensors", first)
    two = place("linearize", "clear_local_5.safetensors", second)
    patched = studio.clear(studio.model, radius=3, weights=one)
    patched = studio.clear(patched, radius=5, weights=two, sites="double")
    patched = studio.clear(patched, radius=9, weights="none", sites="single.1")
    key = "{}.{}.attn.to_k.weight"
    rows = slice(WIDTH, 2 * WIDTH)
    for parameter, expected in (
        ("double_blocks.1.img_attn.qkv", second[key.format("transformer_blocks", 1)]),
        ("single_blocks.0.linear1", first[key.format("single_transformer_blocks", 0)]),
        ("single_blocks.1.linear1", base_tensors["single_blocks.1.linear1.weight"][rows]),
    ):
        assert torch.equal(effective(patched, f"{parameter}.weight")[rows], expected), parameter
    runtime = studio.patching.runtime_of(patched)
    assert set(runtime.parameters.by_site()) == {"single.0"}
    assert [settings.trained for settings in runtime.sites.values()] == [True, True, True, False]


def test_a_kind_behind_them_takes_the_weights_of_its_sites_away_and_says_so(comfy, studio, place, base_tensors, notes):
    tensors = published()
    name = place("linearize", "clear_local_3.safetensors", tensors)
    patched = studio.clear(studio.model, radius=3, weights=name)
    assert notes == [f"weights: {name}"]
    patched = comfy.node("LinearizeHybrid")(model=patched, sites="double.1,single", feature_map="elu1")[0]
    assert "trained weights of double.1, single.0-1 that an earlier node put in were taken out" in notes[1]
    for parameter, expected in (
        ("double_blocks.0.img_attn.qkv", tensors["transformer_blocks.0.attn.to_q.weight"]),
        ("double_blocks.1.img_attn.qkv", base_tensors["double_blocks.1.img_attn.qkv.weight"][:WIDTH]),
        ("single_blocks.0.linear1", base_tensors["single_blocks.0.linear1.weight"][:WIDTH]),
    ):
        assert torch.equal(effective(patched, f"{parameter}.weight")[:WIDTH], expected), parameter


def test_pooling_weights_are_counted_and_travel_with_the_model(comfy, studio, place):
    """They are an additional model: loaded with the base, counted, cloned, and made anew for another GPU."""
    name = place("linearize", "clear_local_3_down_4.safetensors", published(4))
    patched = studio.clear(studio.model, radius=3, weights=name)
    (side,) = patched.get_additional_models_with_key("linearize")
    assert side.model_size() == 4 * 16 * 4
    parameters = studio.patching.runtime_of(patched).parameters
    assert side.model is parameters
    (cloned,) = patched.clone().get_additional_models_with_key("linearize")
    assert cloned.model is parameters and studio.patching.runtime_of(patched.clone()).parameters is parameters
    (deep,) = patched.deepclone_multigpu().get_additional_models_with_key("linearize")
    assert deep.model is not parameters
    assert [each.pool.tolist() for each in deep.model.by_site().values()] == [
        each.pool.tolist() for each in parameters.by_site().values()
    ]


def test_trained_sites_belong_to_their_kind(studio, place):
    """They ignore min_tokens and the part of sampling; a mask makes them dense, and the node says what that means."""
    name = place("linearize", "clear_local_3.safetensors", published())
    patched = studio.clear(studio.model, radius=3, weights=name, min_tokens=10_000, end_percent=0.1)
    studio.sample(patched)
    assert {(r.kind, r.backend) for r in studio.record(patched).ran} == {("clear", "torch")}
    positive = studio.condition()
    positive[0][1]["attention_mask"] = torch.full((1, 108, 108), -1.0)
    positive[0][1]["attention_mask_img_shape"] = (8, 12)
    with studio.runtime.expect_declines("mask"):
        studio.sample(patched, positive=positive)
    assert "trained weights on dense attention: an attention mask is given" in studio.record(patched).summary()


def test_what_does_not_quite_match_is_said(studio, place, comfy):
    name = place("linearize", "clear_local_8_down_4.safetensors", {**published(4), "extra": torch.zeros(1)})
    patched, _ = comfy.node("LinearizeCLEAR")(model=studio.model, radius=16, weights=name).args
    assert studio.patching.runtime_of(patched).sites["double.0"].spec.down_factor == 4
    source = comfy.module("nodes.clear_source")
    host, module = studio.patching.host_of(studio.model)
    notes = source.clear_source(name, comfy.module("attention.specs").ClearSpec(16), host, module).notes
    assert notes == (
        f"weights: {name}",
        "these weights were distilled for radius 8, the node runs radius 16",
        "1 other tensors in the file were ignored, such as extra",
    )


def broken(case):
    tensors = published(4 if "pool" in case else 1)
    first = "transformer_blocks.0.attn.to_q.weight"
    if case == "missing":
        del tensors[first]
    elif case == "wrong shape":
        tensors[first] = torch.zeros(8, 8)
    elif case == "whole numbers":
        tensors[first] = torch.zeros(WIDTH, WIDTH, dtype=torch.int32)
    elif case == "nan":
        tensors[first][3, 3] = math.nan
    elif case == "pool missing":
        del tensors["transformer_blocks.1.attn.processor.spatial_weight"]
    elif case == "pool shape":
        tensors["transformer_blocks.1.attn.processor.spatial_weight"] = torch.zeros(1, 1, 1, 2, 1, 4, 1)
    return tensors


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "holds 27 of the 28 attention tensors .* transformer_blocks.0.attn.to_q.weight"),
        ("wrong shape", r"has shape \(8, 8\) where this FLUX.1 needs \(256, 256\)"),
        ("whole numbers", "holds torch.int32, not floating point"),
        ("nan", "NaN|infinit"),
        ("pool missing", "pooling weights for 3 of 4 sites"),
        ("pool shape", "pooling weights have the shapes"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(studio, place, case, words):
    name = place("linearize", "clear_local_3.safetensors", broken(case))
    before = {key: list(value) for key, value in studio.model.patches.items()}
    with pytest.raises(ValueError, match=words) as error:
        studio.clear(studio.model, radius=3, weights=name)
    assert "\n" not in str(error.value)
    assert studio.model.patches == before and studio.patching.runtime_of(studio.model) is None


def test_pooling_that_the_node_contradicts(studio, place):
    name = place("linearize", "clear_local_8_down_4.safetensors", published(4))
    with pytest.raises(ValueError, match="distilled with down_factor 4, the node says 2; set it to 4, or to 1"):
        studio.clear(studio.model, radius=8, down_factor=2, weights=name)


def test_a_name_that_is_not_there(studio):
    with pytest.raises(ValueError, match="there is no lost.safetensors in .*linearize"):
        studio.clear(studio.model, weights="lost.safetensors")
