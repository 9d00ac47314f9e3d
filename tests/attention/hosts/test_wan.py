"""Wan beside the contract that it shares with all hosts: names of its weights, and sizes of the released models."""

from types import SimpleNamespace

import pytest
from families import collect

from linearize.attention.hosts import find_host
from linearize.attention.hosts.wan import WanHost

FAMILIES = {family.name: family for family in collect()}


@pytest.mark.parametrize(
    ("out_dim", "pixels", "grid"),
    [
        (16, (832, 480, 81), (21, 30, 52)),
        (16, (1280, 720, 81), (21, 45, 80)),
        (16, (1024, 1024, 1), (1, 64, 64)),
        (48, (1280, 704, 121), (31, 22, 40)),
    ],
    ids=["480p", "720p", "picture", "5B"],
)
def test_grids_of_the_released_models(out_dim, pixels, grid):
    module = SimpleNamespace(out_dim=out_dim, patch_size=(1, 2, 2))
    assert WanHost().planned_layout(module, *pixels, 0).grids == ((0, grid),)


def test_diffusers_names(tiny):
    host, model = WanHost(), tiny(FAMILIES["wan vace"])
    targets = host.diffusers_targets(model)
    assert len(targets) == 6 * 4 * 2
    found = {name: targets[name].key for name in ("blocks.1.attn1.to_out.0.bias", "vace_blocks.1.attn1.to_k.weight")}
    assert list(found.values()) == ["blocks.1.self_attn.o.bias", "vace_blocks.1.self_attn.k.weight"]
    sites = host.diffusers_sites(model)
    assert (sites["blocks.3.attn1"], sites["vace_blocks.1.attn1"]) == ("blocks.3", "vace.1")


def test_hooked_modules_issue_self_attention_only(tiny):
    for name in ("wan", "wan i2v", "wan humo", "wan animate"):
        model = tiny(FAMILIES[name])
        paths = find_host(model).site_modules(model)
        assert list(paths.values()) == ["blocks.0.self_attn", "blocks.1.self_attn"]
