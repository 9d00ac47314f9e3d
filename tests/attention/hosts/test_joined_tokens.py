"""Style references: patches that join tokens to the text inside of a forward leave sites and grids as they are."""

import contextlib

import pytest
import torch
from families import collect

from linearize.attention.hosts import HOSTS
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import Runtime, SiteSettings, expect_declines
from linearize.attention.specs import ClearSpec

# of every family whose core lets patches change the text before its blocks run
FAMILIES = [family for family in collect() if family.name in ("flux", "flux2", "krea2", "mage_flow", "qwen_image")]
CASES = [
    pytest.param(family, name, id=f"{family.name}-{name}")
    for family in FAMILIES
    for name in family.cases
    if not family.cases[name].declines and "without padding" not in name  # a mask of its own fits no other length
]


def style(count):
    """A patch that puts `count` tokens before the text, as ComfyUI's USO Style Reference does."""

    def join(args):
        text, ids = args["txt"], args["txt_ids"]
        tokens = torch.full_like(text[:, :1], 0.25).expand(-1, count, -1)
        args["txt"] = torch.cat([tokens, text], dim=1)
        args["txt_ids"] = torch.cat([torch.zeros_like(ids[:, :1]).expand(-1, count, -1), ids], dim=1)
        return args

    return join


def runtime_of(family, radius):
    host = next(host for host in HOSTS if host.name == family.host)
    return Runtime(host, dict.fromkeys(family.sites, SiteSettings(ClearSpec(radius))), LongLived())


def test_the_families_are_there():
    assert len(FAMILIES) == 5


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_style_reference_keeps_the_grid(family, name, watch):
    case, runtime = family.cases[name], runtime_of(family, 2)
    patches = {"post_input": [style(4), style(3)]}
    _, calls = watch(family, runtime, family.inputs(case), AttentionOverride(), patches=patches)
    assert {(ran.site, ran.kind) for ran in runtime.record.ran} == {(site, "clear") for site in family.sites}
    for call in (call for call in calls if call.site):
        found = [(segment.role, segment.length, segment.grid) for segment in call.layout.segments]
        at = [role for role, _, _ in case.segments].index("text")
        assert found == [*case.segments[:at], ("reference", 7, None), *case.segments[at:]]
        assert call.q.shape[2] == case.num_tokens + 7
    assert len(patches["post_input"]) == 2, "the patches of the model are its own"


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES])
def test_a_radius_over_everything_equals_the_untouched_model_with_its_style(family, watch):
    runtime, inputs = runtime_of(family, 1000), family.inputs(family.cases["plain"])
    patches = {"post_input": [style(3)]}
    dense, _ = watch(family, runtime, inputs, patches=patches)
    clear, _ = watch(family, runtime, inputs, AttentionOverride(), patches=patches)
    assert (clear - dense).abs().max() < 1e-4 and not runtime.record.declined


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES])
def test_tokens_joined_to_the_picture_are_a_decline(family, watch):
    def append(args):
        args["img"] = torch.cat([args["img"], args["img"][:, :3]], dim=1)
        args["img_ids"] = torch.cat([args["img_ids"], args["img_ids"][:, :3]], dim=1)
        return args

    runtime = runtime_of(family, 2)
    inputs, patches = family.inputs(family.cases["plain"]), {"post_input": [style(3), append]}
    # some models cannot cut such a picture again
    with expect_declines("layout"), contextlib.suppress(RuntimeError, ValueError):
        watch(family, runtime, inputs, AttentionOverride(), patches=patches)
    assert {ran.kind for ran in runtime.record.ran} == {"dense"}


def test_joined_tokens_are_those_of_one_forward(watch):
    family = FAMILIES[0]
    runtime, case = runtime_of(family, 2), family.cases["plain"]
    for count in (5, 0, 2):
        patches = {"post_input": [style(count)]} if count else {}
        _, calls = watch(family, runtime, family.inputs(case), AttentionOverride(), patches=patches)
        assert {call.layout.num_tokens for call in calls if call.site} == {case.num_tokens + count}
