"""FLUX.1 beside what other nodes do to it; the contract that it shares with all hosts is in test_contract.py."""

import math

import torch
from families import collect

from linearize.attention.hosts.flux import FluxHost
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import Runtime, SiteSettings, expect_declines
from linearize.attention.specs import ClearSpec

FLUX = next(family for family in collect() if family.name == "flux")


def make_runtime():
    return Runtime(FluxHost(), {site: SiteSettings(ClearSpec(3)) for site in FLUX.sites}, LongLived())


def test_tokens_added_by_another_node_are_noticed(watch):
    """A patch that appends image tokens makes the layout wrong; the call is declined, never computed wrongly."""

    def append(args):
        extra = args["img"][:, :3]
        return {
            **args,
            "img": torch.cat([args["img"], extra], 1),
            "img_ids": torch.cat([args["img_ids"], args["img_ids"][:, :3]], 1),
        }

    runtime = make_runtime()
    with expect_declines("layout"):
        inputs = FLUX.inputs(FLUX.cases["one text token"])
        watch(FLUX, runtime, inputs, AttentionOverride(), patches={"post_input": [append]})
    assert {r.kind for r in runtime.record.ran} == {"dense"}
    assert sum(runtime.record.declined.values()) == len(FLUX.sites)
    reasons = {reason.text for _, reason in runtime.record.declined}
    assert len(reasons) == 1 and "20 tokens where 1 text + 16 main = 17" in reasons.pop()


def test_controlnet_residuals_change_nothing_about_the_layout(watch):
    inputs = FLUX.inputs(FLUX.cases["odd"])
    tokens = math.prod(math.ceil(size / 2) for size in inputs.latent.shape[2:])
    inputs.extra["control"] = {"input": [torch.ones(1, tokens, 256)], "output": [torch.ones(1, tokens, 256)]}
    runtime = make_runtime()
    watch(FLUX, runtime, inputs, AttentionOverride())
    assert {(r.site, r.kind) for r in runtime.record.ran} == {(site, "clear") for site in FLUX.sites}
