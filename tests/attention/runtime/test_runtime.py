"""The override's contract with its caller, call by call, on a host made for the test."""

import contextlib
import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from host_calls import HEAD_DIM, HEADS, HOST, LAYOUT, TOKENS, call, flat, host_attention, qkv, runtime

from linearize.attention import ClearSpec, DenseSpec, reference_attention
from linearize.attention.hosts import ModelCall
from linearize.attention.kinds.kind import Learned
from linearize.attention.kinds.reference import clear_mask
from linearize.attention.layout import Reason
from linearize.attention.memory import LongLived
from linearize.attention.runtime import backends as backends_module
from linearize.attention.runtime import registry
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import (
    CALL_KEY,
    RUNTIME_KEY,
    ForwardFacts,
    Runtime,
    SiteSettings,
    UnexpectedDecline,
    expect_declines,
)
from linearize.attention.students.learned import StudentParameters


@pytest.mark.parametrize("skip_reshape", [True, False])
@pytest.mark.parametrize("skip_output_reshape", [True, False])
@pytest.mark.parametrize("four_dimensional_v", [True, False])
def test_every_layout_of_inputs_and_outputs(skip_reshape, skip_output_reshape, four_dimensional_v):
    q, k, v = qkv()
    truth = reference_attention(q, k, v, LAYOUT, ClearSpec(2)).float()
    inputs = (q, k, v) if skip_reshape else (flat(q), flat(k), v.transpose(1, 2) if four_dimensional_v else flat(v))
    before = [t.clone() for t in inputs]
    state = runtime()
    output = call(state, *inputs, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    expected = truth if skip_output_reshape else flat(truth)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "q, k or v was written into"
    assert {(r.site, r.kind, r.backend) for r in state.record.ran} == {("a", "clear", "torch")}


def test_scale_is_passed_on():
    q, k, v = qkv()
    truth = reference_attention(q, k, v, LAYOUT, ClearSpec(2), scale=0.9).float()
    torch.testing.assert_close(
        call(runtime(), q, k, v, skip_reshape=True, scale=0.9), flat(truth), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("positional", [True, False])
def test_a_mask_goes_to_the_host_unchanged(positional):
    q, k, v = qkv()
    mask = torch.randn(TOKENS, TOKENS)
    state = runtime()
    with expect_declines("mask"):
        if positional:
            output = call(state, q, k, v, mask, skip_reshape=True)
        else:
            output = call(state, q, k, v, mask=mask, skip_reshape=True)
    assert torch.equal(output, flat(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    assert [reason.code for _, reason in state.record.declined] == ["mask"]


@pytest.mark.parametrize(
    "mask", [torch.ones(TOKENS, TOKENS, dtype=torch.bool), torch.zeros(2, 1, TOKENS)], ids=["boolean", "additive"]
)
def test_a_mask_that_hides_nothing_is_none(mask, monkeypatch):
    state, read = runtime(), []
    truth = call(state, *qkv(), skip_reshape=True)
    facts, hides = ForwardFacts(LAYOUT), torch.Tensor.all
    monkeypatch.setattr(torch.Tensor, "all", lambda self: (read.append(self.shape == mask.shape), hides(self))[1])
    options = {"site": "a", RUNTIME_KEY: state, CALL_KEY: facts}
    for _ in range(3):
        output = AttentionOverride()(
            host_attention, *qkv(), HEADS, mask=mask, skip_reshape=True, transformer_options=options
        )
        assert torch.equal(output, truth)
    assert sum(read) == 1, "a mask is read once per forward"


@pytest.mark.parametrize("skip_reshape", [True, False])
def test_heads_that_share_keys_and_values(skip_reshape):
    q, k, v = qkv()
    shared = [tensor[:, :1] for tensor in (k, v)]
    truth = call(runtime(), q, *(tensor.expand_as(q) for tensor in shared), skip_reshape=True)
    inputs = [q, *shared] if skip_reshape else [flat(tensor) for tensor in (q, *shared)]
    assert torch.equal(call(runtime(), *inputs, skip_reshape=skip_reshape, enable_gqa=True), truth)


def test_values_with_an_axis_of_heads():
    """As SD3 calls: q and k are (B, N, H D), v is (B, N, H, D)."""
    q, k, v = qkv()
    truth = call(runtime(), q, k, v, skip_reshape=True)
    assert torch.equal(call(runtime(), flat(q), flat(k), v.transpose(1, 2)), truth)


def test_cross_attention_is_not_ours_and_not_counted():
    q, _, _ = qkv()
    text = torch.randn(2, HEADS, 7, HEAD_DIM)
    state = runtime()
    assert torch.equal(
        call(state, q, text, text, skip_reshape=True), flat(F.scaled_dot_product_attention(q, text, text))
    )
    call(state, flat(q), flat(text), flat(text))
    assert not state.record.ran


@pytest.mark.parametrize("options", [None, {}, {"site": "a"}])
def test_calls_without_our_options_go_to_the_host(options):
    q, k, v = qkv()
    kwargs = {} if options is None else {"transformer_options": options}
    output = AttentionOverride()(host_attention, q, k, v, HEADS, skip_reshape=True, **kwargs)
    assert torch.equal(output, flat(F.scaled_dot_product_attention(q, k, v)))


def test_sites_that_are_not_planned_and_dense_ones_go_to_what_was_there_before():
    seen = []

    def previous(func, q, k, v, heads, **kwargs):
        seen.append(kwargs)
        return func(q, k, v, heads, **kwargs)

    q, k, v = qkv()
    override = AttentionOverride(previous)
    call(runtime(), q, k, v, override=override, site="b", skip_reshape=True, _inside_attn_wrapper=True)
    call(runtime(DenseSpec()), q, k, v, override=override, skip_reshape=True, _inside_attn_wrapper=True)
    assert len(seen) == 2
    for kwargs in seen:
        assert kwargs["_inside_attn_wrapper"] is True and kwargs["skip_reshape"] is True
        assert CALL_KEY not in kwargs["transformer_options"] and "site" in kwargs["transformer_options"]


def forward(state, options=()):
    """Return the options of one forward of a sampling run."""
    return state.begin_call(ModelCall(None, (), {}), {RUNTIME_KEY: state, "site": "a", **dict(options)})


ROUNDED = torch.tensor(0.7, dtype=torch.float32)  # 0.699999988


@pytest.mark.parametrize(
    ("sigma", "kind"),
    [(0.9, "dense"), (0.8, "clear"), (0.5, "clear"), (0.3, "clear"), (0.2, "dense"), (ROUNDED + 0.1, "clear")],
)
@pytest.mark.parametrize("moved", [0.0, 1e-7, -1e-7])
def test_part_of_sampling_in_noise_levels(sigma, kind, moved):
    """The bounds are inside, however the noise level on them is rounded."""
    state = runtime(percents=(0.2, 0.7))
    state.start_run(lambda percent: 1 - percent)
    options = forward(state, {"sigmas": torch.tensor([0.0, float(sigma) + moved])})
    AttentionOverride()(host_attention, *qkv(), HEADS, skip_reshape=True, transformer_options=options)
    assert {r.kind for r in state.record.ran} == {kind} and not state.record.declined


def test_a_part_of_sampling_is_that_of_the_run_not_of_the_node():
    """A node behind ours may set another schedule; a runtime that was told none runs at every noise level."""
    state, kinds = runtime(percents=(0.5, 1.0)), []
    for schedule in (None, lambda percent: 1 - percent, lambda percent: 10 * (1 - percent)):
        state.start_run(schedule)
        options = forward(state, {"sigmas": torch.tensor([0.9])})
        AttentionOverride()(host_attention, *qkv(), HEADS, skip_reshape=True, transformer_options=options)
        kinds.append({ran.kind for ran in state.record.ran})
    assert kinds == [{"clear"}, {"dense"}, {"clear"}]


def test_trained_sites_ignore_part_of_sampling_and_min_tokens():
    state = runtime(percents=(0.2, 0.7), min_tokens=1000, trained=True)
    state.start_run(lambda percent: 1 - percent)
    options = forward(state, {"sigmas": torch.tensor([0.99])})
    AttentionOverride()(host_attention, *qkv(), HEADS, skip_reshape=True, transformer_options=options)
    assert {r.kind for r in state.record.ran} == {"clear"}


@pytest.mark.parametrize(("min_tokens", "kind"), [(TOKENS, "clear"), (TOKENS + 1, "dense")])
def test_calls_with_fewer_tokens_than_asked_for_stay_dense(min_tokens, kind):
    state = runtime(min_tokens=min_tokens)
    call(state, *qkv(), skip_reshape=True)
    assert {ran.kind for ran in state.record.ran} == {kind} and not state.record.declined
    assert [reason.text for _, reason in state.record.skipped] == ["33 tokens, below min_tokens = 34"] * (
        kind == "dense"
    )


def test_an_unknown_layout_is_a_decline_and_strict_raises_it():
    reason = Reason("arguments", "nobody told the grid")
    with expect_declines("arguments"):
        output = call(runtime(), *qkv(), skip_reshape=True, layout=reason)
    assert torch.equal(output, flat(F.scaled_dot_product_attention(*qkv())))
    with pytest.raises(UnexpectedDecline, match="a: nobody told the grid"), expect_declines("mask"):
        call(runtime(), *qkv(), skip_reshape=True, layout=reason)


@pytest.mark.parametrize("error", [RuntimeError(), NotImplementedError(), TypeError("x"), MemoryError(), IndexError()])
def test_whatever_a_backend_throws_ends_in_a_picture(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(registry, "clear_attention", fail)
    state = runtime()
    with expect_declines("memory" if isinstance(error, MemoryError) else "failed"):
        output = call(state, *qkv(), skip_reshape=True)
    assert torch.equal(output, flat(F.scaled_dot_product_attention(*qkv())))
    assert "backend torch" in state.record.summary() or not state.record.sampled


class Preferred:
    """A backend that `auto` takes before torch: it fails, or gives NaN."""

    name = "preferred"

    def __init__(self, error=None):
        self.error = error

    def can_run(self, call):
        return None

    def run(self, query, *args, **kwargs):
        if self.error is not None:
            raise self.error
        return query * float("nan")


def test_where_the_preferred_backend_fails_torch_computes_the_same(monkeypatch):
    order = (Preferred(RuntimeError("an illegal memory access")), backends_module.TORCH)
    monkeypatch.setattr(backends_module, "AUTO_ORDER", order)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    state = runtime()
    state.start_run()
    q, k, v = qkv()
    output = call(state, q, k, v, skip_reshape=True)
    truth = reference_attention(q, k, v, LAYOUT, ClearSpec(2)).float()
    torch.testing.assert_close(output, flat(truth), atol=1e-5, rtol=1e-5)
    assert {(r.site, r.kind, r.backend) for r in state.record.ran} == {("a", "clear", "torch")}
    assert "backend preferred failed: RuntimeError: an illegal memory access" in state.record.summary()


def test_where_torch_fails_too_the_call_stays_dense(monkeypatch):
    order = (Preferred(RuntimeError("first")), Preferred(RuntimeError("second")))
    monkeypatch.setattr(backends_module, "AUTO_ORDER", order)
    monkeypatch.setitem(backends_module.BACKENDS, "torch", order[1])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with expect_declines("failed"):
        output = call(runtime(), *qkv(), skip_reshape=True)
    assert torch.equal(output, flat(F.scaled_dot_product_attention(*qkv())))


def test_a_site_with_nan_uses_torch_from_the_next_run_on(monkeypatch):
    monkeypatch.setattr(backends_module, "AUTO_ORDER", (Preferred(), backends_module.TORCH))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    state = runtime()
    used = []
    for _ in range(3):
        state.start_run()
        call(state, *qkv(), skip_reshape=True)
        state.finish_run()
        used.append((next(iter(state.record.ran)).backend, state.record.non_finite))
    assert used == [("preferred", ("a",)), ("torch", ()), ("torch", ())]


def test_values_of_another_length_are_left_to_the_host():
    q, k, v = qkv()
    state = runtime()
    with expect_declines("failed"):
        call(state, q, k, v[:, :, :-1], skip_reshape=True)
    assert {r.kind for r in state.record.ran} == {"dense"}
    assert "32 tokens where 3 text + 30 main = 33" in next(iter(state.record.declined))[1].text


def test_a_failed_attempt_frees_its_tensors_before_the_host_runs(monkeypatch):
    kept = []

    def fail(query, *args, **kwargs):
        scratch = torch.zeros(1000)
        kept.append(weakref.ref(scratch))
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(registry, "clear_attention", fail)
    alive = []

    def previous(func, q, k, v, heads, **kwargs):
        gc.collect()
        alive.append(kept[0]() is not None)
        return func(q, k, v, heads, **kwargs)

    with expect_declines("memory"):
        call(runtime(), *qkv(), override=AttentionOverride(previous), skip_reshape=True)
    assert alive == [False]


def test_flags_survive_a_change_of_inference_mode_and_large_values():
    state = runtime()
    with torch.inference_mode():
        state.note_output("a", torch.full((4,), 1e38))
    state.note_output("a", torch.full((4,), 1e38))
    state.finish_run()
    assert state.record.non_finite == ()
    state.note_output("a", torch.tensor([1.0, float("inf")]))
    state.note_output("a", torch.ones(2))
    state.finish_run()
    assert state.record.non_finite == ("a",)


def test_copies_share_settings_and_parameters_only():
    state = runtime()
    state.start_run()
    call(state, *qkv(), skip_reshape=True)
    for other in (state.copy(), copy.deepcopy({"options": state})["options"]):
        assert other.sites == state.sites and other.parameters is state.parameters
        assert other.memory is not state.memory and not other.record.ran and not other.record.sampled
    assert "was not sampled" in state.copy().record.summary()


def test_what_a_site_learned_is_read_once_per_call(monkeypatch):
    state, reads = runtime(), []
    learned = type(state.parameters).learned
    monkeypatch.setattr(type(state.parameters), "learned", lambda *of: (reads.append(of), learned(*of))[1])
    call(state, *qkv(), skip_reshape=True)
    assert len(reads) == 1


def test_a_status_that_cannot_be_shown_costs_nothing():
    def broken(text):
        raise ConnectionError("closed")

    state = Runtime(HOST, {"a": SiteSettings(ClearSpec(2))}, LongLived(), status=broken)
    state.start_run()
    state.finish_run()


def test_merging_keeps_both_statuses_and_the_later_settings():
    told = []
    first = Runtime(HOST, {"a": SiteSettings(ClearSpec(2)), "b": SiteSettings(ClearSpec(3))}, LongLived(),
                    status=lambda text: told.append("first"))  # fmt: skip
    second = Runtime(HOST, {"b": SiteSettings(ClearSpec(9))}, LongLived(), status=lambda text: told.append("second"))
    merged = second.merged_over(first)
    merged.start_run()
    merged.finish_run()
    assert told == ["first", "second"]
    assert {site: settings.spec.radius for site, settings in merged.sites.items()} == {"a": 2, "b": 9}
    other = Runtime(SimpleNamespace(name="x", title="X"), {}, LongLived())
    with pytest.raises(ValueError, match="settings for X cannot follow settings for Test"):
        other.merged_over(first)


def test_the_noise_level_is_read_only_where_a_setting_needs_it():
    """Reading it waits for the device."""

    class Unread:
        def max(self):
            raise AssertionError("the noise level was read")

    state = runtime()
    state.start_run(lambda percent: 1 - percent)
    assert forward(state, {"sigmas": Unread()})[CALL_KEY].outside == frozenset()


@pytest.mark.parametrize("spec", [DenseSpec(), ClearSpec(2)], ids=["dense", "declined"])
@pytest.mark.parametrize("skip_reshape", [True, False])
def test_what_stays_dense_counts_every_pair_of_query_and_key(spec, skip_reshape):
    q, k, v = qkv()
    state, reason = runtime(spec), Reason("arguments", "nobody told the grid")
    with expect_declines("arguments"):
        inputs = (q, k, v) if skip_reshape else (flat(q), flat(k), flat(v))
        call(state, *inputs, skip_reshape=skip_reshape, layout=reason)
    assert state.record.pairs == state.record.dense_pairs == HEADS * TOKENS**2


def test_what_runs_counts_the_pairs_that_it_computes():
    """And of matrices behind it, as many pairs as have their FLOPs."""
    spec, matrices = ClearSpec(2), torch.eye(HEAD_DIM).repeat(HEADS, 1, 1)
    pairs = HEADS * int(clear_mask(LAYOUT, spec).sum())
    for state, more in ((runtime(spec), 0), (runtime(spec), HEADS * 30 * HEAD_DIM // 2)):
        if more:
            state.parameters = StudentParameters({"a": Learned(output=matrices)})
        call(state, *qkv(batch=3), skip_reshape=True)
        assert (state.record.pairs, state.record.dense_pairs) == (pairs + more, HEADS * TOKENS**2)


@pytest.mark.parametrize("settings", [{"percents": (0.0, 0.5)}, {"min_tokens": TOKENS + 1}, {}], ids=str)
def test_a_backend_by_name_is_asked_for_only_where_it_is_to_run(settings):
    state = runtime(backend="reference", **settings)
    state.start_run(lambda percent: 1 - percent)
    latent, options = torch.zeros(1, 4, 5, 6, dtype=torch.int8), {"sigmas": torch.tensor([0.2])}
    refused = pytest.raises(ValueError, match="backend reference cannot run here")
    with contextlib.nullcontext() if settings else refused:
        state.begin_call(ModelCall(None, (latent,), {}), options)


def test_the_core_pauses_its_recording_where_the_plan_is_not_dense():
    paused = []
    sites = {"a": SiteSettings(ClearSpec(2)), "b": SiteSettings(DenseSpec())}
    state = Runtime(HOST, sites, LongLived(lambda: (paused.append(True), contextlib.nullcontext())[1]))
    for site, count in (("a", 1), ("b", 1), ("c", 1), ("a", 2)):
        with state.recording_paused(site):
            assert len(paused) == count, site


def test_the_last_run_is_that_of_a_clone_where_only_the_clone_was_sampled():
    state = runtime()
    clone = state.copy()
    assert "was not sampled" in state.last_run() and "was not sampled" in clone.last_run()
    clone.start_run()
    call(clone, *qkv(), skip_reshape=True)
    clone.finish_run()
    assert state.last_run() == f"{clone.record.summary()}\n(a copy of this model was sampled)"
    assert clone.last_run() == clone.record.summary()
    state.start_run()
    assert state.last_run() == state.record.summary() and "no attention call" in state.last_run()


def test_a_mask_keeps_the_other_half_of_the_guidance_dense_and_no_other():
    state = runtime()
    state.note_mask("a", (0,))
    assert state.masked_in_another_half("a", (1,)).code == "mask"
    for site, half in (("a", (0,)), ("a", ()), ("a", (0, 1)), ("b", (1,))):
        assert state.masked_in_another_half(site, half) is None, (site, half)
    state.start_run()
    assert state.masked_in_another_half("a", (1,)) is None
    q, k, v = qkv()
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    with expect_declines("mask"):
        for half, given in (((0,), None), ((0,), mask), ((1,), None)):
            options = {"site": "a", RUNTIME_KEY: state, CALL_KEY: ForwardFacts(LAYOUT, half=half)}
            AttentionOverride()(
                host_attention, q, k, v, HEADS, mask=given, skip_reshape=True, transformer_options=options
            )
    assert [(ran.kind, count) for ran, count in state.record.ran.items()] == [("clear", 1), ("dense", 2)]
