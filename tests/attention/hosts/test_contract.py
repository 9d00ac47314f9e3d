"""What every host has to keep, on a tiny model of ComfyUI's own class: golden calls, and oracles without layout code.

The oracles change one thing in an input and look which tokens of the first site change.
"""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from families import cells_to_probe, collect, patch_slices, seen_from, tokens_of_patch

from linearize.attention.hosts import HOSTS, find_host
from linearize.attention.layout import Reason, TokenLayout
from linearize.attention.memory import LongLived
from linearize.attention.planning.cost import clear_pairs
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import Runtime, SiteSettings, expect_declines
from linearize.attention.specs import ClearSpec, FoveatedSpec

FAMILIES = collect()
ALL = [pytest.param(family, name, id=f"{family.name}-{name}") for family in FAMILIES for name in family.cases]
PLAIN = [pytest.param(family, id=family.name) for family in FAMILIES]


def host_of(family):
    return next(host for host in HOSTS if host.name == family.host)


def make_runtime(family, spec=None):
    settings = SiteSettings(spec or ClearSpec(2))
    return Runtime(host_of(family), dict.fromkeys(family.sites, settings), LongLived())


def changed_inputs(inputs, path, index):
    """Return the inputs with 1 added to one part of one of them."""
    moved = copy.deepcopy(inputs)
    moved.named(path)[index] += 1.0
    return moved


@pytest.mark.parametrize(("family", "name"), ALL)
def test_golden_calls(family, name, watch):
    case = family.cases[name]
    inputs = family.inputs(case)
    output, calls = watch(family, make_runtime(family), inputs)
    assert output.shape[0] == case.batch and output.shape[2:] == inputs.latent.shape[2:]
    found = tuple((call.site, call.q.shape[2], call.k.shape[2]) for call in calls)
    assert found == (case.calls or tuple((site, case.tokens_at(site), case.tokens_at(site)) for site in family.sites))
    sites = [call for call in calls if call.site]
    assert [call.site for call in sites] == list(family.sites)
    for call in sites:
        assert isinstance(call.layout, TokenLayout), call.layout
        assert tuple((s.role, s.length, s.grid) for s in call.layout.segments) == case.at(call.site)
        assert call.q.shape == (case.batch, family.heads, case.tokens_at(call.site), family.head_dim)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_one_latent_patch_is_the_token_that_the_layout_names(family, name, watch, changed_tokens):
    case, runtime = family.cases[name], make_runtime(family)
    inputs = family.inputs(case)
    before = first_site(watch(family, runtime, inputs, oracle=True))
    for cell in cells_to_probe(case, family.patch):
        moved = changed_inputs(inputs, "latent", patch_slices(family.patch, cell))
        after = first_site(watch(family, runtime, moved, oracle=True))
        assert changed_tokens(before.q, after.q) == tokens_of_patch(case, family.patch, cell), cell


def first_site(watched):
    return next(call for call in watched[1] if call.site)


@pytest.mark.parametrize(("family", "name"), [p for p in ALL if p.values[0].cases[p.values[1]].probes])
def test_text_references_and_pads_are_the_tokens_that_the_layout_names(family, name, watch, tiny, changed_tokens):
    case, runtime = family.cases[name], make_runtime(family)
    inputs = family.inputs(case)
    before = first_site(watch(family, runtime, inputs, oracle=True))
    for path, index, tokens in case.probes:
        if path.startswith("parameter:"):
            parameter = tiny(family, oracle=True).get_parameter(path.removeprefix("parameter:"))
            original = parameter.clone()
            parameter[index] += 1.0
            after = first_site(watch(family, runtime, inputs, oracle=True))
            parameter.copy_(original)
        else:
            after = first_site(watch(family, runtime, changed_inputs(inputs, path, index), oracle=True))
        assert changed_tokens(before.q, after.q) == tokens, path


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize(("radius", "temporal_radius"), [(1, 0), (3, 0), (3, 2)])
def test_a_token_reaches_only_those_that_may_see_it(family, radius, temporal_radius, watch, changed_tokens):
    """At the first site nothing else mixes tokens, so the change of its output shows who sees the changed token."""
    case = family.cases["plain"]
    inputs = family.inputs(case)
    for cell in cells_to_probe(case, family.patch)[:2]:
        (token,) = tokens_of_patch(case, family.patch, cell)
        moved = changed_inputs(inputs, "latent", patch_slices(family.patch, cell))
        outputs = []
        for each in (inputs, moved):
            runtime = make_runtime(family, ClearSpec(radius, temporal_radius))
            outputs.append(first_site(watch(family, runtime, each, AttentionOverride(), oracle=True)).output)
            assert_all_clear(family, runtime)
        assert changed_tokens(*outputs) == seen_from(case, token, radius, temporal_radius)


def assert_all_clear(family, runtime, kind="clear"):
    assert {(ran.site, ran.kind, ran.backend) for ran in runtime.record.ran} == {
        (site, kind, "torch") for site in family.sites
    }
    assert not runtime.record.declined


@pytest.mark.parametrize("spec", [ClearSpec(1000), FoveatedSpec(top=1.0)], ids=lambda spec: spec.kind)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_what_sees_everything_equals_the_untouched_model(family, name, spec, watch):
    case = family.cases[name]
    inputs = family.inputs(case)
    runtime = make_runtime(family, spec)
    dense, _ = watch(family, runtime, inputs)
    with expect_declines(*case.declines):
        clear, _ = watch(family, runtime, inputs, AttentionOverride())
    assert torch.isfinite(dense).all() and (clear - dense).abs().max() < 1e-4
    if not case.declines:
        assert_all_clear(family, runtime, spec.kind)
        return
    assert {site for site, _ in runtime.record.declined} == set(family.sites)
    for _, reason in runtime.record.declined:
        assert reason.code in case.declines and case.reason in reason.text


@pytest.mark.parametrize("family", [family for family in PLAIN if family.values[0].batches])
def test_items_of_a_batch_stay_apart(family, watch, changed_tokens):
    """Cond and uncond run as one batch of 2; what changes in one never reaches the other."""
    case = next(case for case in family.cases.values() if case.batch == 2)
    inputs, outputs = family.inputs(case), []
    for each in (inputs, changed_inputs(inputs, "latent", 1)):
        outputs.append(watch(family, make_runtime(family), each, AttentionOverride())[0])
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("family", PLAIN)
def test_exactly_one_host_knows_the_model_and_its_sites(family, tiny):
    model = tiny(family)
    assert [host.name for host in HOSTS if host.mismatch(model) is None] == [family.host]
    host = find_host(model)
    found = [(site.id, site.num_heads, site.head_dim) for site in host.sites(model)]
    assert found == [(site, family.heads, family.head_dim) for site in family.sites]


class Passing:
    """A wrapper that passes attributes on, as torch.compile's does."""

    def __init__(self, inner):
        self._orig_mod = inner

    def __getattr__(self, name):
        return getattr(self._orig_mod, name)


def opaque(module):
    """Return the structure of a model in which every layer is of a class nobody knows, without tensors to look into."""
    if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential):
        return [opaque(child) for child in module]
    children = dict(module.named_children())
    if not children and not list(module.parameters(recurse=False)):
        return object()
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    held = dict.fromkeys((name for name, _ in module.named_parameters(recurse=False)), object())
    return SimpleNamespace(**plain, **held, **{name: opaque(child) for name, child in children.items()})


@pytest.mark.parametrize("family", PLAIN)
def test_quantised_and_wrapped_models_are_recognised(family, tiny):
    """By structure: layers of another class with packed weights (GGUF, fp8), and a model behind a wrapper."""
    model = tiny(family)
    sites = find_host(model).sites(model)
    for other in (Passing(model), opaque(model)):
        host = find_host(other)
        assert (host.name, host.sites(other)) == (family.host, sites)


@pytest.mark.parametrize(("family", "name"), [p for p in ALL if p.values[0].cases[p.values[1]].pixels])
def test_planned_layout_is_the_one_that_arrives(family, name, tiny):
    case = family.cases[name]
    assert case.pixels is not None
    planned = host_of(family).planned_layout(tiny(family), *case.pixels, case.text)
    assert tuple((s.role, s.length, s.grid) for s in planned.segments) == case.segments


@pytest.mark.parametrize("family", PLAIN)
def test_default_radius_saves_at_2048_pixels(family, tiny):
    host = host_of(family)
    layout = host.planned_layout(tiny(family), 2048, 2048, 1, host.default_text_tokens)
    assert clear_pairs(ClearSpec(), layout) / layout.num_tokens**2 < 0.5
    assert any(case.pixels for case in family.cases.values()), "one case compares planned and real layout"


@pytest.mark.parametrize("family", PLAIN)
def test_weight_names_exist(family, tiny):
    host, model = host_of(family), tiny(family)
    weights = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    norms = host.norm_parameters(model)
    assert set(norms) <= set(weights) and len(norms) == len(family.sites)
    assert set(host.diffusers_sites(model).values()) <= set(family.sites)
    for name, target in host.diffusers_targets(model).items():
        shape = weights[target.key]
        assert target.start + target.shape[0] <= shape[0] and target.shape[1:] == shape[1:], name
        assert any(name.startswith(f"{site}.") for site in host.diffusers_sites(model)), name


@pytest.mark.parametrize("family", PLAIN)
def test_the_weights_of_every_site(family, tiny):
    """Each site has some of its own, its published projections among them, and none of an MLP or of cross-attention."""
    host, model = host_of(family), tiny(family)
    weights, found = set(model.state_dict()), {}
    for site, paths in host.site_weights(model).items():
        for path in paths:
            below = {name for name in weights if name.startswith(f"{path}.")}
            assert below, path
            found[site] = found.get(site, set()) | below
    assert set(found) == set(family.sites)
    assert sum(map(len, found.values())) == len(set().union(*found.values())), "no weight belongs to two sites"
    for name, target in host.diffusers_targets(model).items():
        (site,) = (site for attention, site in host.diffusers_sites(model).items() if name.startswith(f"{attention}."))
        assert target.key in found[site], name
    others = re.compile(r"mlp|ffn?_|\.ff|cross|mod(ulation)?[.X]|img_mod|txt_mod")
    assert [name for names in found.values() for name in names if others.search(name)] == []


@pytest.mark.parametrize("family", PLAIN)
def test_arguments_that_tell_no_grid_are_a_reason(family, tiny):
    from linearize.attention.hosts import ModelCall

    found = host_of(family).layout(ModelCall(tiny(family), (torch.zeros(1, 16),), {}))
    assert isinstance(found, Reason) and found.code == "arguments"


# vision tokens, sound, frames in several sizes, and a clip some of whose tokens are left out
WITHOUT_PLACE = {
    ("hunyuan_video_15", "picture and glyphs"), ("ltx", "a guide in low resolution"), ("wan s2v", "motion"),
    ("minimax h3", "first and last frame"), ("minimax h3", "references"), ("z_image_omni", "references"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), ALL)
def test_references_have_a_place(family, name, watch):
    """A picture of its own is cut into tiles by kinds that see through means."""
    _, calls = watch(family, make_runtime(family), family.inputs(family.cases[name]))
    found = {s.place for call in calls if call.site for s in call.layout.segments if s.role == "reference"}
    assert (None in found) == ((family.name, name) in WITHOUT_PLACE)
