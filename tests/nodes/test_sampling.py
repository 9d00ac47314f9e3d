"""The CLEAR node through ComfyUI's sampler: equality, settings, other patches, isolation."""

import copy

import pytest
import torch

OVERRIDE = "optimized_attention_override"


@pytest.mark.parametrize("size", [(16, 24), (17, 23)], ids=["even", "odd"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_radius_over_everything_equals_the_untouched_model(studio, everywhere, size, cfg):
    dense = studio.sample(studio.model, size=size, cfg=cfg)
    patched = studio.clear(studio.model, radius=100)
    clear = studio.sample(patched, size=size, cfg=cfg)
    assert studio.ran(patched) == everywhere
    assert (clear - dense).abs().max() < 1e-5


def test_a_small_radius_changes_the_picture_and_equals_the_reference(studio, everywhere):
    dense = studio.sample(studio.model)
    patched = studio.clear(studio.model, radius=3)
    clear = studio.sample(patched)
    assert studio.ran(patched) == everywhere
    assert (clear - dense).abs().max() > 1e-2
    checked = studio.clear(studio.model, radius=3, backend="reference")
    reference = studio.sample(checked)
    assert studio.ran(checked) == dict.fromkeys(everywhere, ("clear", "reference"))
    assert (clear - reference).abs().max() < 1e-4


def test_deleting_what_puts_the_override_on_turns_these_tests_red(studio, everywhere):
    """Without it the picture is dense and nothing is recorded: the assertions above cannot pass by luck."""
    patched = studio.clear(studio.model, radius=100)
    del patched.model_options["transformer_options"][OVERRIDE]
    studio.sample(patched)
    assert studio.ran(patched) == everywhere, "the wrapper of the forward puts the override back"
    patched.remove_wrappers_with_key("diffusion_model", "linearize")
    del patched.model_options["transformer_options"][studio.runtime.RUNTIME_KEY]
    dense = studio.sample(studio.model)
    assert (studio.sample(patched) - dense).abs().max() < 1e-5
    with pytest.raises(AttributeError):
        studio.ran(patched)


def test_an_override_without_its_wrapper_says_that_nothing_reached_it(studio):
    patched = studio.clear(studio.model, radius=2)
    patched.remove_wrappers_with_key("diffusion_model", "linearize")
    assert torch.equal(studio.sample(patched), studio.sample(studio.model))
    assert studio.record(patched).summary().startswith("NOTHING RAN · no attention call reached this node: ")


def test_pooled_and_long_text(studio, everywhere):
    patched = studio.clear(studio.model, radius=2, down_factor=4)
    picture = studio.sample(patched, positive=studio.condition(tokens=300), cfg=2.0)
    assert studio.ran(patched) == everywhere
    plain = studio.sample(studio.clear(studio.model, radius=2), positive=studio.condition(tokens=300), cfg=2.0)
    assert (picture - plain).abs().max() > 1e-3


def test_reference_latents(studio, everywhere):
    positive = studio.condition()
    positive[0][1]["reference_latents"] = [torch.randn(1, 16, 10, 12)]
    dense = studio.sample(studio.model, positive=positive)
    patched = studio.clear(studio.model, radius=100)
    assert (studio.sample(patched, positive=positive) - dense).abs().max() < 1e-5
    assert studio.ran(patched) == everywhere
    layouts = studio.record(patched).layouts
    assert [[(s.role, s.length) for s in layout.segments] for layout in layouts] == [
        [("text", 12), ("main", 96), ("reference", 30)]
    ]


def test_some_sites(studio):
    patched = studio.clear(studio.model, radius=2, sites="double.1, single")
    studio.sample(patched)
    assert studio.ran(patched) == dict.fromkeys(("double.1", "single.0", "single.1"), ("clear", "torch"))


def test_part_of_sampling(studio):
    patched = studio.clear(studio.model, radius=2, end_percent=0.5)
    studio.sample(patched, steps=4)
    record = studio.record(patched)
    assert {(r.kind, r.backend) for r in record.ran} == {("clear", "torch"), ("dense", "host")}
    assert not record.declined
    assert {reason.code for _, reason in record.skipped} == {"sigma"}
    first_half = sum(calls for ran, calls in record.ran.items() if ran.kind == "clear")
    assert 0 < first_half < sum(record.ran.values())


def test_few_tokens_stay_dense_by_setting(studio):
    patched = studio.clear(studio.model, radius=2, min_tokens=109)
    studio.sample(patched)
    record = studio.record(patched)
    assert {r.kind for r in record.ran} == {"dense"} and not record.declined
    assert "108 tokens, below min_tokens = 109" in record.summary()
    patched = studio.clear(studio.model, radius=2, min_tokens=108)
    studio.sample(patched)
    assert {r.kind for r in studio.record(patched).ran} == {"clear"}


def test_an_attention_mask_falls_back_to_dense_and_says_so(studio):
    positive = studio.condition()
    positive[0][1]["attention_mask"] = torch.full((1, 108, 108), -1.0)
    positive[0][1]["attention_mask_img_shape"] = (8, 12)
    dense = studio.sample(studio.model, positive=positive)
    patched = studio.clear(studio.model, radius=2)
    with studio.runtime.expect_declines("mask"):
        masked = studio.sample(patched, positive=positive)
    assert torch.equal(masked, dense)
    assert {reason.code for _, reason in studio.record(patched).declined} == {"mask"}
    assert "fell back to dense" in studio.record(patched).summary()


def test_an_unexpected_decline_is_an_error_under_strict(studio, monkeypatch):
    positive = studio.condition()
    positive[0][1]["attention_mask"] = torch.full((1, 108, 108), -1.0)
    positive[0][1]["attention_mask_img_shape"] = (8, 12)
    patched = studio.clear(studio.model, radius=2)
    with pytest.raises(AssertionError, match="an attention mask is given"):
        studio.sample(patched, positive=positive)
    monkeypatch.setenv("LINEARIZE_STRICT", "0")
    studio.sample(patched, positive=positive)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError, "backend torch failed: RuntimeError: out of memory"),
        (torch.OutOfMemoryError, "backend torch ran out of memory"),
        (TypeError, "backend torch failed: TypeError: out of memory"),
    ],
)
def test_a_failing_backend_falls_back_to_dense(studio, monkeypatch, failure, words):
    registry = studio.runtime.__dict__["choose_backend"].__globals__["registry"]

    def fail(*args, **kwargs):
        raise failure("out of memory\nsecond line")

    monkeypatch.setattr(registry, "clear_attention", fail)
    dense = studio.sample(studio.model)
    patched = studio.clear(studio.model, radius=2)
    with studio.runtime.expect_declines("memory" if "memory" in words else "failed"):
        assert torch.equal(studio.sample(patched), dense)
    assert words in studio.record(patched).summary()


def test_a_wished_backend_that_cannot_run_is_an_error_before_anything_is_computed(studio):
    patched = studio.clear(studio.model, radius=2, backend="reference")
    with pytest.raises(ValueError, match="backend reference cannot run here: .* stops at 4608, this call has 4912"):
        studio.sample(patched, size=(140, 140))
    assert studio.ran(patched) == {}


def test_an_earlier_override_runs_what_we_leave_to_the_host(studio):
    calls = []

    def earlier(func, q, k, v, heads, **kwargs):
        calls.append(kwargs["transformer_options"]["block_type"])
        return func(q, k, v, heads, **kwargs)

    model = studio.model.clone()
    model.model_options["transformer_options"][OVERRIDE] = earlier
    patched = studio.clear(model, radius=2, sites="single")
    studio.sample(patched, steps=2)
    assert calls == ["double"] * 4
    assert studio.ran(patched) == dict.fromkeys(("single.0", "single.1"), ("clear", "torch"))


def test_a_later_override_that_chains_keeps_ours(studio, everywhere):
    patched = studio.clear(studio.model, radius=2)
    ours = patched.model_options["transformer_options"][OVERRIDE]
    later = patched.clone()
    later.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: ours(func, *args, **kwargs)
    expected = studio.sample(patched)
    assert torch.equal(studio.sample(later), expected)
    assert studio.ran(later) == everywhere


def test_ours_around_another_around_ours_counts_each_call_once(studio):
    first = studio.clear(studio.model, radius=2)
    ours = first.model_options["transformer_options"][OVERRIDE]
    middle = first.clone()
    middle.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: ours(func, *args, **kwargs)
    outer = studio.clear(middle, radius=2, min_tokens=10_000)
    studio.sample(outer, steps=2)
    record = studio.record(outer)
    assert {r.kind for r in record.ran} == {"dense"} and sum(record.ran.values()) == 8


def test_two_nodes_merge_by_site_and_the_last_wins(studio):
    first = studio.clear(studio.model, radius=2)
    second = studio.clear(first, radius=100, sites="double.0")
    override = second.model_options["transformer_options"][OVERRIDE]
    assert override is first.model_options["transformer_options"][OVERRIDE], "one override is enough"
    sites = studio.patching.runtime_of(second).sites
    assert {site: settings.spec.radius for site, settings in sites.items()} == {
        "double.0": 100, "double.1": 2, "single.0": 2, "single.1": 2,
    }  # fmt: skip
    before = studio.patching.runtime_of(first).sites
    assert before["double.0"].spec.radius == 2, "the model that came in was changed"
    wrappers = second.wrappers["diffusion_model"]["linearize"]
    assert len(wrappers) == 1


def test_the_model_that_comes_in_is_not_changed(studio):
    before = copy.copy(studio.model.model_options["transformer_options"])
    callbacks, wrappers = copy.deepcopy(studio.model.callbacks), copy.deepcopy(studio.model.wrappers)
    weights = {name: value.clone() for name, value in studio.model.model.state_dict().items()}
    studio.sample(studio.clear(studio.model, radius=2))
    assert studio.model.model_options["transformer_options"] == before
    assert studio.model.callbacks == callbacks and studio.model.wrappers == wrappers
    assert all(torch.equal(weights[name], value) for name, value in studio.model.model.state_dict().items())


def test_clones_share_no_state(studio, everywhere):
    patched = studio.clear(studio.model, radius=2)
    studio.sample(patched)
    clone = patched.clone()
    assert studio.ran(clone) == {}, "a clone starts with an empty record"
    assert studio.patching.runtime_of(clone) is not studio.patching.runtime_of(patched)
    assert studio.patching.runtime_of(clone).memory is not studio.patching.runtime_of(patched).memory
    calls = sum(studio.record(patched).ran.values())
    studio.sample(clone, steps=4)
    assert studio.ran(clone) == everywhere
    assert sum(studio.record(patched).ran.values()) == calls


def test_each_run_starts_a_new_record_and_keeps_no_tables(studio):
    patched = studio.clear(studio.model, radius=2)
    studio.sample(patched, steps=2)
    studio.sample(patched, steps=3)
    assert sum(studio.record(patched).ran.values()) == 3 * 4
    assert studio.patching.runtime_of(patched).memory._values == {}
    assert studio.record(patched).share_linearized == 1.0
    assert 0 < studio.record(patched).share_computed < 1


def test_state_is_reset_after_an_error(studio):
    patched = studio.clear(studio.model, radius=2)

    def fail(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise ZeroDivisionError

    broken = patched.clone()
    broken.add_wrapper_with_key("apply_model", "test", fail)
    with pytest.raises(ZeroDivisionError):
        studio.sample(broken)
    assert studio.patching.runtime_of(broken).memory._values == {}


def test_non_finite_outputs_are_named(studio):
    def poison(q, k, v, **kwargs):
        index = kwargs["extra_options"]["block_index"]
        return {"v": v * float("inf")} if index == 1 and kwargs["extra_options"]["block_type"] == "single" else {}

    patched = studio.clear(studio.model, radius=2)
    patched.set_model_attn1_patch(poison)
    studio.sample(patched, steps=1)
    assert studio.record(patched).non_finite == ("single.1",)
    assert "infinite or NaN output at single.1" in studio.record(patched).summary()


def test_a_context_that_changes_size_between_calls(studio, everywhere):
    """Two samplings of one patched model at different sizes and text lengths: nothing is remembered from the first."""
    patched = studio.clear(studio.model, radius=100)
    for size, tokens in (((16, 24), 12), (((9, 31)), 5), ((16, 24), 40)):
        positive = studio.condition(tokens=tokens)
        dense = studio.sample(studio.model, size=size, positive=positive)
        assert (studio.sample(patched, size=size, positive=positive) - dense).abs().max() < 1e-5
        assert studio.ran(patched) == everywhere
