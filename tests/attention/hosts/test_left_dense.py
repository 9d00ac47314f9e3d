"""Calls that hosts cannot lay out, or that a model splits: they are declined by name and run dense."""

from dataclasses import replace

import pytest
import torch
from families import collect

from linearize.attention.hosts import HOSTS
from linearize.attention.hosts.wan import WanHost
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import Runtime, SiteSettings, expect_declines
from linearize.attention.specs import ClearSpec

FAMILIES = {family.name: family for family in collect()}


@pytest.fixture
def declined(watch):
    """A function: the reason for which every site declined one forward, and the calls; the output is the dense one."""

    def run(name, inputs, code):
        family = FAMILIES[name]
        host = next(host for host in HOSTS if host.name == family.host)
        runtime = Runtime(host, dict.fromkeys(family.sites, SiteSettings(ClearSpec(2))), LongLived())
        dense, calls = watch(family, runtime, inputs)
        with expect_declines(code):
            found, _ = watch(family, runtime, inputs, AttentionOverride())
        assert (found - dense).abs().max() < 1e-5
        assert {ran.kind for ran in runtime.record.ran} == {"dense"}
        assert {site for site, _ in runtime.record.declined} == set(family.sites)
        (reason,) = {str(reason) for _, reason in runtime.record.declined}
        return reason, [(call.site, call.q.shape[2]) for call in calls if call.site]

    return run


def test_ltx_guides_of_another_strength_split_the_attention(declined):
    family = FAMILIES["ltx"]
    case = replace(family.cases["guides"], options={"strength": 0.5})
    reason, calls = declined("ltx", family.inputs(case), "split")
    assert "splits this self-attention" in reason
    assert calls == [(site, tokens) for site in family.sites for tokens in (60, 80)]


def test_ltx_tokens_taken_from_the_video(declined):
    family = FAMILIES["ltx"]
    inputs = family.inputs(family.cases["guides"])
    inputs.extra["denoise_mask"][:, :, 1, 2, 3] = -1.0
    reason, _ = declined("ltx", inputs, "guides")
    assert reason == "a node removes tokens from the video itself"


def test_hidream_e1_puts_its_picture_beside_the_latent(declined):
    family = FAMILIES["hidream"]
    inputs = family.inputs(family.cases["batch 2"])
    inputs.extra["image_cond"] = torch.randn_like(inputs.latent)
    reason, calls = declined("hidream", inputs, "references")
    assert "lies beside the latent" in reason
    assert {tokens for _, tokens in calls} == {8 * 10 + 7}, "each row holds cells of both"


def test_wan_frame_by_frame_is_shown_to_nobody_and_the_record_says_so(watch, tiny):
    family = FAMILIES["wan causal"]
    case, model = family.cases["plain"], tiny(family)
    runtime = Runtime(WanHost(), dict.fromkeys(family.sites, SiteSettings(ClearSpec(2))), LongLived())
    runtime.start_run()
    caches = model.init_kv_caches(1, 60, "cpu", torch.float32), model.init_crossattn_caches(1, "cpu", torch.float32)
    state = dict(zip(("start_frame", "kv_caches", "crossattn_caches"), (0, *caches), strict=True))
    _, calls = watch(family, runtime, family.inputs(case), AttentionOverride(), ar_state=state)
    assert not calls and "shows no forward of this model to other code" in runtime.record.summary()
    _, calls = watch(family, runtime, family.inputs(case), AttentionOverride())
    assert runtime.record.share_linearized == 1.0, "as one clip it runs"
