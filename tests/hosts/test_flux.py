"""FLUX: golden layouts on ComfyUI's own class, and an oracle that needs no layout code to judge them."""

import math
from types import SimpleNamespace

import pytest
import torch

from linearize.attention.hosts import HOSTS, ModelCall, find_host
from linearize.attention.hosts.flux import FluxHost
from linearize.attention.layout import Reason
from linearize.attention.memory import LongLived
from linearize.attention.runtime import AttentionOverride, Runtime, SiteSettings
from linearize.attention.specs import ClearSpec

SITES = ("double.0", "double.1", "single.0", "single.1")


def make_runtime(spec=None):
    spec = spec or ClearSpec(3)
    return Runtime(FluxHost(), {site: SiteSettings(spec) for site in SITES}, LongLived())


def latent(height, width, batch=1, seed=0):
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


def text(tokens, batch=1, seed=1):
    return torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed))


# name: (latent height, width, batch, text tokens, reference sizes) -> segments as (role, start, length, grid)
GOLDEN = {
    "plain": ((32, 48, 1, 7, ()), [("text", 0, 7, None), ("main", 7, 384, (1, 16, 24))]),
    "odd": ((33, 27, 1, 5, ()), [("text", 0, 5, None), ("main", 5, 17 * 14, (1, 17, 14))]),
    "one text token": ((8, 8, 1, 1, ()), [("text", 0, 1, None), ("main", 1, 16, (1, 4, 4))]),
    "long text": ((8, 8, 1, 700, ()), [("text", 0, 700, None), ("main", 700, 16, (1, 4, 4))]),
    "batch 2": ((16, 10, 2, 3, ()), [("text", 0, 3, None), ("main", 3, 40, (1, 8, 5))]),
    "references": (
        (16, 16, 1, 4, ((10, 13), (6, 8))),
        [
            ("text", 0, 4, None),
            ("main", 4, 64, (1, 8, 8)),
            ("reference", 68, 5 * 7, None),
            ("reference", 103, 12, None),
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_layouts(name, watch):
    (height, width, batch, tokens, references), expected = GOLDEN[name]
    refs = [latent(*size, batch, seed=9) for size in references] or None
    output, calls = watch(make_runtime(), latent(height, width, batch), text(tokens, batch), refs)
    assert output.shape == (batch, 16, height, width)
    assert [call.site for call in calls] == list(SITES)
    for call in calls:
        found = [(s.segment.role, s.start, s.segment.length, s.segment.grid) for s in call.layout.spans]
        assert found == expected
        assert call.q.shape == (batch, 2, call.layout.num_tokens, 128)


@pytest.mark.parametrize(("height", "width"), [(16, 22), (15, 21)])
@pytest.mark.parametrize("cell", [(0, 0), (3, 7), (7, 10)])
def test_one_latent_patch_is_the_token_that_the_layout_names(height, width, cell, watch):
    y, x = cell
    before, changed = latent(height, width), latent(height, width)
    changed[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0
    first, second = (watch(make_runtime(), each, text(5))[1][0] for each in (before, changed))
    start, (_, _, columns) = first.layout.grids[0]
    expected = {start + y * columns + x}
    if height % 2 and y == 0:  # an odd latent is padded with its own first rows and columns
        expected.add(start + (height // 2) * columns + x)
    if width % 2 and x == 0:
        expected.add(start + y * columns + width // 2)
    if height % 2 and width % 2 and cell == (0, 0):
        expected.add(start + (height // 2) * columns + width // 2)
    assert changed_tokens(first.q, second.q) == expected


def test_one_patch_of_a_reference_and_one_text_token(watch):
    refs = [latent(10, 13, seed=5), latent(6, 8, seed=6)]
    base = watch(make_runtime(), latent(16, 16), text(4), refs)[1][0]
    moved = [refs[0], refs[1].clone()]
    moved[1][:, :, 2:4, 4:6] += 1.0
    found = watch(make_runtime(), latent(16, 16), text(4), moved)[1][0]
    second = base.layout.spans[3]
    assert changed_tokens(base.q, found.q) == {second.start + 1 * 4 + 2}
    words = text(4)
    words[:, 2] += 1.0
    assert changed_tokens(base.q, watch(make_runtime(), latent(16, 16), words, refs)[1][0].q) == {2}


def changed_tokens(first, second):
    return set((first != second).any(dim=-1).any(dim=1).any(dim=0).nonzero().flatten().tolist())


@pytest.mark.parametrize("radius", [1, 3, 5])
@pytest.mark.parametrize("cell", [(0, 0), (4, 6)])
def test_a_token_reaches_only_those_that_may_see_it(radius, cell, watch):
    """At the first site nothing else mixes tokens, so the change of its output shows who sees the changed token."""
    y, x = cell
    tokens, rows, columns = 5, 9, 12
    changed = latent(18, 24)
    changed[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0
    override = AttentionOverride()
    outputs = []
    for each in (latent(18, 24), changed):
        runtime = make_runtime(ClearSpec(radius))
        outputs.append(watch(runtime, each, text(tokens), override=override)[1][0].output)
        assert {(r.site, r.kind, r.backend) for r in runtime.record.ran} == {(s, "clear", "torch") for s in SITES}
    seen = set(range(tokens)) | {
        tokens + b * columns + a for b in range(rows) for a in range(columns) if (b - y) ** 2 + (a - x) ** 2 < radius**2
    }
    reshaped = [output.unflatten(-1, (2, 128)).transpose(1, 2) for output in outputs]
    assert changed_tokens(*reshaped) == seen


def test_radius_over_everything_equals_the_untouched_model(watch, tiny_flux):
    runtime = make_runtime(ClearSpec(100))
    dense, _ = watch(runtime, latent(18, 26), text(6))
    clear, _ = watch(runtime, latent(18, 26), text(6), override=AttentionOverride())
    assert {(r.site, r.kind) for r in runtime.record.ran} == {(site, "clear") for site in SITES}
    assert not runtime.record.declined
    assert (clear - dense).abs().max() < 1e-5


def test_sites(tiny_flux):
    host = find_host(tiny_flux)
    assert host.name == "flux"
    assert [(s.id, s.num_heads, s.head_dim) for s in host.sites(tiny_flux)] == [(site, 2, 128) for site in SITES]


def test_planned_layout_is_the_one_that_arrives(tiny_flux, watch):
    """For 200 x 136 pixels the latent is 25 x 17, which the model pads."""
    planned = FluxHost().planned_layout(tiny_flux, 136, 200, 1, 5)
    assert watch(make_runtime(), latent(25, 17), text(5))[1][0].layout == planned


def test_quantised_and_wrapped_modules_are_recognised(tiny_flux):
    """By structure: modules of another class (GGUF, fp8), and a model behind a wrapper that passes attributes on."""

    class Wrapper:
        def __init__(self, inner):
            self._orig_mod = inner

        def __getattr__(self, name):
            return getattr(self._orig_mod, name)

    assert find_host(Wrapper(tiny_flux)).name == "flux"

    def opaque(names, **attributes):
        return SimpleNamespace(**dict.fromkeys(names, object()), **attributes)

    attention = opaque(("qkv", "proj", "norm"))
    quantised = opaque(
        ("img_in", "txt_in", "time_in", "vector_in", "pe_embedder", "final_layer"),
        double_blocks=[opaque((), img_attn=attention, txt_attn=attention)],
        single_blocks=[opaque(("linear1", "linear2"))],
        patch_size=2,
        num_heads=24,
        hidden_size=3072,
    )
    assert find_host(quantised).name == "flux"
    quantised.double_stream_modulation_img = object()
    with pytest.raises(ValueError, match="FLUX.2"):
        find_host(quantised)


def test_unknown_models_are_refused_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        find_host(torch.nn.Linear(2, 2))
    assert "does not know this model (Linear)" in str(error.value)
    assert all(host.title in str(error.value) for host in HOSTS)


def test_arguments_that_tell_no_grid_are_a_reason():
    found = FluxHost().layout(ModelCall(SimpleNamespace(patch_size=2), (torch.zeros(1, 16, 1, 8, 8),), {}))
    assert isinstance(found, Reason) and found.code == "arguments"


def test_tokens_added_by_another_node_are_noticed(watch):
    """A patch that appends image tokens makes the layout wrong; the call is declined, never computed wrongly."""
    from linearize.attention.runtime import expect_declines

    def append(args):
        extra = args["img"][:, :3]
        return {
            **args,
            "img": torch.cat([args["img"], extra], 1),
            "img_ids": torch.cat([args["img_ids"], args["img_ids"][:, :3]], 1),
        }

    runtime = make_runtime()
    with expect_declines("layout"):
        watch(runtime, latent(8, 8), text(4), override=AttentionOverride(), patches={"post_input": [append]})
    assert {r.kind for r in runtime.record.ran} == {"dense"}
    assert sum(runtime.record.declined.values()) == len(SITES)
    reasons = {reason.text for _, reason in runtime.record.declined}
    assert len(reasons) == 1 and "23 tokens where 4 text + 16 main = 20" in reasons.pop()


def test_controlnet_residuals_change_nothing_about_the_layout(tiny_flux, watch):
    height, width = 16, 22
    tokens = math.ceil(height / 2) * math.ceil(width / 2)
    control = {"input": [torch.ones(1, tokens, 256)], "output": [torch.ones(1, tokens, 256)]}
    runtime = make_runtime()
    original = tiny_flux.forward

    def with_control(*args, **kwargs):
        return original(*args[:6], control, *args[7:], **kwargs)

    tiny_flux.forward = with_control
    try:
        watch(runtime, latent(height, width), text(4), override=AttentionOverride())
    finally:
        del tiny_flux.forward
    assert {(r.site, r.kind) for r in runtime.record.ran} == {(site, "clear") for site in SITES}
