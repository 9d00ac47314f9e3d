"""The CLEAR node on models other than FLUX.1: CLEAR's published files are for FLUX.1 alone."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def source(comfy):
    return comfy.module("nodes.clear_source")


@pytest.fixture
def others(comfy):
    hosts = [host for host in comfy.module("attention.hosts").HOSTS if host.name != "flux"]
    assert len(hosts) > 5
    return hosts


def test_no_published_weights_are_taken_for_other_models(source, others, comfy):
    spec = comfy.module("attention.specs").ClearSpec(16)
    assert source.published_name(16, 1)
    for host in others:
        found = source.clear_source("auto", spec, host, SimpleNamespace())
        assert found.weights is None
        assert found.notes == (f"untrained: nobody publishes weights for {host.title} with radius 16",)


@pytest.mark.parametrize("choice", ("auto", "none"))
def test_untrained_pooled_keys_name_the_node_that_counts_right(source, others, comfy, choice):
    specs = comfy.module("attention.specs")
    found = source.clear_source(choice, specs.ClearSpec(8, down_factor=4), others[0], SimpleNamespace())
    assert found.weights is None and found.spec.down_factor == 4, "what was asked for runs"
    assert found.notes[-1:] == (source.POOLED_UNTRAINED,) and "Foveated Attention" in source.POOLED_UNTRAINED
    windows = source.clear_source(choice, specs.ClearSpec(8), others[0], SimpleNamespace())
    assert len(windows.notes) == (choice == "auto")


def test_choosing_a_published_file_for_another_model_is_refused_before_the_download(source, others, comfy):
    spec = comfy.module("attention.specs").ClearSpec(16)
    name = source.published_name(16, 1)
    for host in others:
        with pytest.raises(
            ValueError, match=f"was made for FLUX.1-dev, this model is {host.title}; choose weights none"
        ):
            source.clear_source(name, spec, host, SimpleNamespace())
