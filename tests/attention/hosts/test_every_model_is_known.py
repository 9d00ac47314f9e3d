"""Every model class of the ComfyUI that the tests run on is served, refused with its reason, or makes no pictures."""

import contextlib

import pytest
import torch
from families import collect
from test_unhookable import MODELS, MORE

NO_DIFFUSION = {"RTv4": "finds objects", "SAM3Model": "cuts out objects", "DepthAnything3Net": "measures depth"}


class Found(Exception):
    """Carries the class of a diffusion model out of its construction."""


class NoWeights(dict):
    """A checkpoint without weights; whatever is asked for is a zero."""

    def __missing__(self, key):
        return torch.zeros(1)


class Sizes(dict):
    """The sizes of a model, all of them some number."""

    def __missing__(self, key):
        return 8

    def copy(self):
        return Sizes(self)


def diffusion_model(supported, monkeypatch):
    """Return the class of the diffusion model of one of ComfyUI's supported models; nothing is built."""
    import comfy.model_base as model_base

    def init(self, model_config, *args, unet_model=model_base.UNetModel, **kwargs):
        # it is the fourth argument where it has no name
        raise Found(args[2] if len(args) > 2 else unet_model)

    monkeypatch.setattr(model_base.BaseModel, "__init__", init)
    with pytest.raises(Found) as found:
        supported(Sizes(supported.unet_config)).get_model(NoWeights(), "")
    return found.value.args[0]


def refused_models():
    for build in [*MODELS.values(), *MORE.values()]:
        # some are newer than this ComfyUI
        with contextlib.suppress(pytest.skip.Exception):
            yield build()


def test_every_model_class_is_known(tiny, monkeypatch):
    import comfy.supported_models

    served = {type(tiny(family)) for family in collect()}
    refused = {type(model) for model in refused_models()}
    unknown, others = {}, set()
    for supported in comfy.supported_models.models:
        with monkeypatch.context() as patch:
            found = diffusion_model(supported, patch)
        if found.__name__ in NO_DIFFUSION:
            others.add(found.__name__)
        elif found not in served | refused:
            unknown[supported.__name__] = found.__qualname__
    assert unknown == {}, "write a host, or an entry in UNHOOKABLE with the reason"
    assert others == set(NO_DIFFUSION)
