"""The tiny FLUX through ComfyUI's own loader and sampler, and what the run record must say."""

from types import SimpleNamespace

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture(scope="session")
def studio(comfy):
    """Everything a person does with nodes: load, condition, patch, sample, read the record."""
    patching = comfy.module("nodes.patching")
    runtime_module = comfy.module("attention.runtime")
    with torch.inference_mode():
        (model,) = comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", "default")

    def condition(text="a", tokens=12):
        with torch.inference_mode():
            return comfy.node("LinearizeDemoText")(text=text, tokens=tokens)[0]

    def clear(model, **inputs):
        with torch.inference_mode():
            return comfy.node("LinearizeCLEAR")(model=model, **inputs)[0]

    def sample(model, *, size=(16, 24), cfg=1.0, positive=None, steps=2, seed=3):
        empty = {"samples": torch.zeros(1, 16, *size)}
        positive, negative = positive or condition(), condition("b")
        with torch.inference_mode():
            (out,) = comfy.nodes.KSampler().sample(
                model, seed, steps, cfg, "euler", "simple", positive, negative, empty, 1.0
            )
        return out["samples"]

    def ran(model):
        """Return {site: (kind, backend)} of the last run; a site that ran two ways is an error."""
        record = patching.runtime_of(model).record
        found = {}
        for each in record.ran:
            assert each.site not in found, f"{each.site} ran two ways"
            found[each.site] = (each.kind, each.backend)
        return found

    return SimpleNamespace(
        model=model,
        condition=condition,
        clear=clear,
        sample=sample,
        ran=ran,
        patching=patching,
        runtime=runtime_module,
        record=lambda model: patching.runtime_of(model).record,
    )


@pytest.fixture
def everywhere():
    """What the record says when every site ran on clear with backend torch."""
    return dict.fromkeys(SITES, ("clear", "torch"))
