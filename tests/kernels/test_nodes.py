"""Nodes with backend triton on the tiny FLUX: ComfyUI's loader and sampler, kernels in the interpreter."""

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture(scope="module")
def sample(comfy, device):
    """A function that samples a picture with a node of the pack; it returns the latent and the run record."""
    if device.type != "cpu":
        pytest.skip("the tests run ComfyUI on the CPU")
    patching = comfy.module("patching")
    generator = torch.Generator().manual_seed(0)
    tensor, pooled = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 32, generator=generator)
    conditioning = [[tensor, {"pooled_output": pooled}]]

    @torch.inference_mode()
    def run(size=(16, 24), node="LinearizeCLEAR", **inputs):
        (model,) = comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", "default")
        patched = comfy.node(node)(model=model, **inputs)[0]
        empty = {"samples": torch.zeros(1, 16, *size)}
        (out,) = comfy.nodes.KSampler().sample(
            patched, 3, 1, 1.0, "euler", "simple", conditioning, conditioning, empty, 1.0
        )
        return out["samples"], patching.runtime_of(patched).record

    return run


@pytest.mark.parametrize("size", [(16, 24), (17, 23)], ids=["even", "odd"])
def test_every_site_runs_on_triton_and_the_picture_is_that_of_torch(sample, size):
    picture, record = sample(size, radius=3, backend="triton")
    assert {(ran.site, ran.kind, ran.backend) for ran in record.ran} == {(site, "clear", "triton") for site in SITES}
    assert not record.declined and not record.non_finite
    assert "clear (triton): 4 sites" in record.summary()
    expected, other = sample(size, radius=3, backend="torch")
    assert {ran.backend for ran in other.ran} == {"torch"}
    assert (picture - expected).abs().max() < 1e-4
    dense, _ = sample(size, radius=100, backend="torch")
    assert (picture - dense).abs().max() > 1e-2


def test_pooled_tokens_too(sample):
    picture, record = sample(radius=2, down_factor=4, backend="triton")
    assert {ran.backend for ran in record.ran} == {"triton"} and len(record.ran) == len(SITES)
    expected, _ = sample(radius=2, down_factor=4, backend="torch")
    assert (picture - expected).abs().max() < 1e-4


def test_without_the_interpreter_the_wish_is_an_error_and_auto_takes_torch(sample, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend triton cannot run here: .* needs an NVIDIA or AMD GPU, got cpu"):
        sample(radius=3, backend="triton")
    _, record = sample(radius=3)
    assert {ran.backend for ran in record.ran} == {"torch"}
    assert [reason.code for reason in record.passed_over] == ["device"]
    assert "GPU" not in record.summary()


@pytest.mark.parametrize(
    ("node", "inputs", "kind"),
    [("LinearizeHybrid", {"rate": 3}, "hybrid"), ("LinearizeLinear", {"feature_map": "elu1"}, "linear")],
)
def test_kinds_with_feature_maps_run_on_triton_as_on_torch(sample, node, inputs, kind):
    picture, record = sample(node=node, backend="triton", **inputs)
    assert {(ran.site, ran.kind, ran.backend) for ran in record.ran} == {(site, kind, "triton") for site in SITES}
    assert not record.declined and not record.non_finite
    expected, other = sample(node=node, backend="torch", **inputs)
    assert {ran.backend for ran in other.ran} == {"torch"}
    assert (picture - expected).abs().max() < 1e-3
