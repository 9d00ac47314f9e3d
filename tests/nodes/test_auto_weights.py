"""`weights = auto`: CLEAR's weights go only into models that are what they began as, by the models' own weights."""

import math
import re
from pathlib import Path

import pytest
import torch

WIDTH, DOUBLE, SINGLE = 256, 2, 2


def own(base, pooled=1, apart=0.0):
    """Return the base's own projections as CLEAR's files name them, moved by a share of their size; random for inf."""
    generator, tensors = torch.Generator().manual_seed(9), {}

    def add(name, fused, first):
        for end in ("weight", "bias"):
            value = base[f"{fused}.{end}"][first * WIDTH : (first + 1) * WIDTH]
            moved = torch.randn(value.shape, generator=generator) * value.std()
            tensors[f"{name}.{end}"] = moved if apart == math.inf else value + moved * apart

    for kind, count in (("transformer_blocks", DOUBLE), ("single_transformer_blocks", SINGLE)):
        for i in range(count):
            name, block = f"{kind}.{i}.attn", f"double_blocks.{i}.img_attn"
            fused = f"{block}.qkv" if kind == "transformer_blocks" else f"single_blocks.{i}.linear1"
            for first, part in enumerate(("to_q", "to_k", "to_v")):
                add(f"{name}.{part}", fused, first)
            if kind == "transformer_blocks":
                add(f"{name}.to_out.0", f"{block}.proj", 0)
            if pooled > 1:
                tensors[f"{name}.processor.spatial_weight"] = torch.ones(1, 1, 1, pooled, 1, pooled, 1) / pooled**2
    return tensors


@pytest.fixture
def auto(comfy, studio):
    """A function: what `auto` does for a model and a spec."""
    source, spec = comfy.module("nodes.clear_source"), comfy.module("attention.specs").ClearSpec
    read = comfy.module("patching.patcher").parameter

    def choose(*values, model=None, **more):
        model = model or studio.model
        host, module = studio.patching.host_of(model)
        return source.clear_source("auto", spec(*values, **more), host, module, lambda key: read(model, key))

    return choose


def test_auto_takes_the_file_that_fits_and_says_what_would(place, comfy, base_tensors, auto, monkeypatch):
    assert "clear_local_8.safetensors was made for FLUX.1-dev, 3072 wide with 19 + 38 blocks; this model is 256 wide "\
        "with 2 + 2 blocks" in auto(8).notes[0]  # fmt: skip
    source = comfy.module("nodes.clear_source")
    with monkeypatch.context() as patch:
        patch.setattr(source, "PUBLISHED_WIDTH", WIDTH)
        assert "with 2 + 2 blocks" in auto(8).notes[0]
        patch.setattr(source, "PUBLISHED_DEPTH", (DOUBLE, SINGLE))
        assert (
            "if this model is FLUX.1-dev or schnell, choose the file under weights to download it" in auto(8).notes[0]
        )
    assert "nobody publishes weights for FLUX.1 with radius 7" in auto(7).notes[0]
    place("linearize", "clear_local_8.safetensors", own(base_tensors))
    place("linearize", "clear_local_16_down_4.safetensors", own(base_tensors, 4))
    assert auto(8).weights.radius == 8 and auto(16, down_factor=4).weights.down_factor == 4
    assert auto(16).weights is None
    place("linearize", "clear_local_8_down_4.safetensors", own(base_tensors))
    assert auto(8, down_factor=4).weights is None
    place("linearize", "clear_local_8.safetensors", own(base_tensors, 4))
    assert auto(8).weights is None and "pooling weights for down_factor 4" in auto(8).notes[0]
    place("linearize", "clear_local_8.safetensors", {"x": torch.zeros(2)})
    assert auto(8).weights is None and "belongs to another model" in auto(8).notes[0]
    place("linearize", "clear_local_8.safetensors", own(base_tensors) | {
        "transformer_blocks.2.attn.to_q.weight": torch.zeros(WIDTH, WIDTH)})  # fmt: skip
    assert auto(8).weights is None and "it has 5 sites, this one has 4" in auto(8).notes[0], "a shallower model"


@pytest.mark.parametrize(("apart", "taken"), [(0.0, True), (0.12, True), (0.3, False), (math.inf, False)])
def test_auto_wants_the_base_that_the_file_began_as(comfy, studio, place, base_tensors, notes, apart, taken):
    """By the base's own weights; what the user chose by name is used on any model that it fits."""
    place("linearize", "clear_local_8.safetensors", own(base_tensors, apart=apart))
    model, key = studio.model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    model.add_patches({key: ("diff", (torch.ones(3 * WIDTH, WIDTH),))})
    studio.sample(model, steps=1)  # the weights in place are patched ones now
    patched = studio.clear(model, radius=8, weights="auto")
    assert all(each.trained is taken for each in studio.patching.runtime_of(patched).sites.values())
    if taken:
        assert notes[-1] == "weights: clear_local_8.safetensors"
    else:
        found = re.search(r"untrained: .* this model's own projections are (\d+)% away from it", notes[-1])
        assert found and int(found[1]) == pytest.approx({0.3: 29, math.inf: 144}[apart], abs=3)
        assert patched.patches == model.patches
    chosen = studio.clear(model, radius=8, weights="clear_local_8.safetensors")
    assert all(each.trained for each in studio.patching.runtime_of(chosen).sites.values())


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4",
                                  "gguf"])  # fmt: skip
def test_auto_knows_copies_that_are_stored_in_fewer_bits(
    comfy, studio, place, base_tensors, auto, packed_models, kind, tmp_path
):
    import comfy.sd as comfy_sd
    import folder_paths

    source = Path(folder_paths.get_full_path("diffusion_models", "linearize_tiny_flux.safetensors"))
    place("linearize", "clear_local_8.safetensors", own(base_tensors, apart=0.1))
    place("linearize", "clear_local_16.safetensors", own(base_tensors, apart=0.3))
    with torch.inference_mode():
        if kind == "gguf":
            model = packed_models.gguf_model(source)
        else:
            packed_models.write_packed(source, tmp_path / "copy.safetensors", kind)
            model = comfy_sd.load_diffusion_model(str(tmp_path / "copy.safetensors"))
    assert auto(8, model=model).weights is not None
    assert auto(16, model=model).weights is None


@pytest.mark.parametrize("fault", ["shape", "error", "nan"])
def test_auto_leaves_weights_that_it_cannot_read(comfy, studio, place, base_tensors, fault):
    """Packs store weights in forms of their own; a node whose default is `auto` must not fail for that."""
    place("linearize", "clear_local_8.safetensors", own(base_tensors))
    source, spec = comfy.module("nodes.clear_source"), comfy.module("attention.specs").ClearSpec(8)

    def read(key):
        if fault == "error":
            raise NotImplementedError("4-bit")
        return torch.zeros(4096, 1, dtype=torch.uint8) if fault == "shape" else base_tensors[key] * math.nan

    (note,) = source.clear_source("auto", spec, *studio.patching.host_of(studio.model), read).notes
    assert note == (
        "untrained: clear_local_8.safetensors was made for FLUX.1-dev, and this model's own projections cannot be "
        "compared with it; to use it all the same, choose the file under weights"
    )


def test_auto_leaves_models_with_more_inputs_alone(studio, place, base_tensors, auto, monkeypatch):
    """FLUX.1 Fill, Depth and Canny have dev's depth and width; a file that a user chose is used there too."""
    place("linearize", "clear_local_8.safetensors", own(base_tensors))
    monkeypatch.setattr(studio.patching.host_of(studio.model)[1], "in_channels", 384)
    assert auto(8).weights is None and "takes more than a latent" in auto(8).notes[0]
    chosen = studio.clear(studio.model, radius=8, weights="clear_local_8.safetensors")
    assert studio.patching.runtime_of(chosen).sites["double.0"].trained
