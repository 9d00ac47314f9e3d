"""What of LTX has to stay dense: guides of another strength, and latents from which a node takes tokens."""

from dataclasses import replace

import pytest
from families import collect

from linearize.attention.hosts.ltx import LTXHost
from linearize.attention.memory import LongLived
from linearize.attention.runtime import AttentionOverride, Runtime, SiteSettings, expect_declines
from linearize.attention.specs import ClearSpec

LTX = next(family for family in collect() if family.name == "ltx")


@pytest.fixture
def declined(watch):
    """A function: the reasons for which every site declined one forward, whose output is the dense one's."""

    def run(case, inputs, code):
        runtime = Runtime(LTXHost(), dict.fromkeys(LTX.sites, SiteSettings(ClearSpec(2))), LongLived())
        dense, calls = watch(LTX, runtime, inputs)
        with expect_declines(code):
            found, _ = watch(LTX, runtime, inputs, AttentionOverride())
        assert (found - dense).abs().max() < 1e-5
        assert {ran.kind for ran in runtime.record.ran} == {"dense"}
        assert {site for site, _ in runtime.record.declined} == set(LTX.sites)
        return {str(reason) for _, reason in runtime.record.declined}, [(c.site, c.q.shape[2]) for c in calls if c.site]

    return run


def test_guides_of_another_strength_split_the_attention(declined):
    case = replace(LTX.cases["guides"], options={"strength": 0.5})
    (reason,), calls = declined(case, LTX.inputs(case), "split")
    assert "splits this self-attention" in reason
    assert calls == [(site, tokens) for site in LTX.sites for tokens in (60, 80)]


def test_tokens_taken_from_the_video(declined):
    case = LTX.cases["guides"]
    inputs = LTX.inputs(case)
    inputs.extra["denoise_mask"][:, :, 1, 2, 3] = -1.0
    (reason,), _ = declined(case, inputs, "guides")
    assert reason == "a node removes tokens from the video itself"
