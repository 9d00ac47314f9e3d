"""What stands in the override slot: what it is put over, what it hands on, and to whom it shows calls."""

import contextlib
import functools
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from host_calls import HEAD_DIM, HEADS, HOST, LAYOUT, TOKENS, call, flat, host_attention, qkv, runtime

from linearize.attention import ClearSpec
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import (
    OVERRIDE_KEY,
    AttentionOverride,
    describe_override,
    find_options,
    model_call_wrapper,
)
from linearize.attention.runtime.runtime import CALL_KEY, RUNTIME_KEY, ForwardFacts, Runtime, SiteSettings


def test_options_are_found_by_position_or_name_and_never_changed():
    state = runtime()
    options = {RUNTIME_KEY: state, "sigmas": torch.tensor([0.5])}
    assert find_options((1, {}, options), {}) == (2, options)
    assert find_options((1,), {"transformer_options": options}) == ("transformer_options", options)
    assert find_options((1, {}), {"a": {}}) is None

    def executor(*args, **kwargs):
        return args, kwargs

    executor.class_obj = None
    for args, kwargs in (((1, options), {}), ((1,), {"transformer_options": options})):
        passed_args, passed_kwargs = model_call_wrapper(executor, *args, **kwargs)
        passed = passed_args[1] if len(passed_args) > 1 else passed_kwargs["transformer_options"]
        assert passed[CALL_KEY] == ForwardFacts(LAYOUT) and CALL_KEY not in options
    assert model_call_wrapper(executor, 5) == ((5,), {})


def test_a_wish_is_judged_by_the_dtype_that_the_model_computes_in():
    """Around the diffusion model the latent is still fp32, whatever the model is."""
    state = Runtime(HOST, {"a": SiteSettings(ClearSpec(2), backend="reference")}, LongLived())
    options, latent = {RUNTIME_KEY: state}, torch.zeros(1, 4, 5, 6)

    def executor(*args, **kwargs):
        return "ran"

    for dtype, words in (
        (torch.bfloat16, None),
        (torch.int8, "attention needs floating point tensors, got torch.int8"),
    ):
        executor.class_obj = SimpleNamespace(diffusion_model=None, get_dtype_inference=lambda dtype=dtype: dtype)
        with contextlib.nullcontext() if words is None else pytest.raises(ValueError, match=words):
            assert model_call_wrapper(executor, latent, transformer_options=options) == "ran"


@pytest.mark.parametrize(
    "module", ["C:\\ComfyUI\\custom_nodes\\other_pack", "/opt/ComfyUI/custom_nodes/other_pack", "other_pack"]
)
def test_an_override_is_named_by_its_package_on_every_system(module):
    def attention():
        """Another node's override."""

    attention.__module__, attention.__qualname__ = module, "Faster.attention"
    assert describe_override(attention) == "another override (Faster of other_pack)"


class Container:
    """One tensor with a single owner, as newer cores hand them over."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        return self.tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def test_tensors_in_containers_are_freed_before_the_output_is_laid_out_anew(monkeypatch):
    """Else queries, keys, values and two outputs are there at once."""
    owned = tuple(Container(tensor) for tensor in qkv())
    alive, reshape = [weakref.ref(each.peek()) for each in owned], torch.Tensor.reshape
    expected = call(runtime(), *qkv(), skip_reshape=True)
    seen = []

    def watched(tensor, *shape):
        if list(shape) in ([2, TOKENS, HEADS * HEAD_DIM], [[2, TOKENS, HEADS * HEAD_DIM]]):
            seen.append([ref() is not None for ref in alive])
        return reshape(tensor, *shape)

    state = runtime()
    options = {"site": "a", RUNTIME_KEY: state, CALL_KEY: ForwardFacts(LAYOUT)}
    monkeypatch.setattr(torch.Tensor, "reshape", watched)
    output = AttentionOverride().container_function(*owned, HEADS, skip_reshape=True, transformer_options=options)
    assert torch.equal(output, expected) and seen == [[False] * 3]
    assert {(ran.kind, ran.backend) for ran in state.record.ran} == {("clear", "torch")}


def test_containers_need_an_attention_to_fall_back_to():
    owned = tuple(Container(tensor) for tensor in qkv())
    options = {"site": "b", RUNTIME_KEY: runtime(), CALL_KEY: ForwardFacts(LAYOUT)}
    with pytest.raises(ValueError, match="needs the host application's attention"):
        AttentionOverride().container_function(*owned, HEADS, skip_reshape=True, transformer_options=options)
    core = AttentionOverride(core=lambda q, k, v, heads, **given: host_attention(
        *(each.take() for each in (q, k, v)), heads, **given))  # fmt: skip
    output = core.container_function(*owned, HEADS, skip_reshape=True, transformer_options=options)
    assert torch.equal(output, flat(F.scaled_dot_product_attention(*qkv())))


@pytest.mark.parametrize("site", ["a", "b"], ids=["planned", "not planned"])
@pytest.mark.parametrize("skip_reshape", [True, False])
def test_distillation_is_shown_what_every_site_was_given_and_gave(site, skip_reshape):
    q, k, v = qkv()
    shown, state = [], runtime()
    state.observe = shown.append
    inputs = [q, k[:, :1], v[:, :1]] if skip_reshape else [flat(q), flat(k[:, :1]), flat(v[:, :1])]
    output = call(state, *inputs, skip_reshape=skip_reshape, site=site, enable_gqa=True, scale=0.5)
    (seen,) = shown
    assert (seen.site, seen.layout, seen.mask, seen.scale) == (site, LAYOUT, None, 0.5)
    assert torch.equal(seen.query, q) and torch.equal(flat(seen.output), output)
    assert torch.equal(seen.key, k[:, :1].expand_as(k)) and torch.equal(seen.value, v[:, :1].expand_as(v))
    assert {ran.kind for ran in state.record.ran} == ({"clear"} if site == "a" else set())


def test_another_nodes_override_ends_up_below_ours_and_is_named():
    state, passed = runtime(), []

    def other(func, *args, **kwargs):
        """Another node's override."""

    def executor(*args, **kwargs):
        passed.append(kwargs["transformer_options"][OVERRIDE_KEY])

    executor.class_obj = None
    for override in (None, other, other):
        options = {RUNTIME_KEY: state, OVERRIDE_KEY: override}
        model_call_wrapper(executor, transformer_options=options)
        assert options[OVERRIDE_KEY] is override
    assert [each.previous for each in passed] == [None, other, other] and passed[1] is passed[2]
    assert state.record.below.startswith("another override (test_another_nodes_override") and state.record.finished == 3
    model_call_wrapper(executor, transformer_options={RUNTIME_KEY: state, OVERRIDE_KEY: passed[0]})
    assert passed[-1] is passed[0], "two nodes of ours share one"


def test_an_override_of_the_core_is_named_by_its_node():
    def attention():
        """The core's override."""

    attention.__qualname__ = "ModelPatcher.set_model_optimized_attention.<locals>.attention"
    assert describe_override(functools.partial(attention, 1)) == "Model Attention Backend"
