"""Exact and linear keys under one denominator on Triton against the float64 oracle, from operators to whole kinds.

Compiled on a GPU, else interpreted (float32 and float16 only, because the interpreter multiplies the bits of bfloat16).
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Segment, TokenLayout, grid_segment, reference_attention
from linearize.attention.gpu import mapped as gpu_mapped
from linearize.attention.gpu import self_test
from linearize.attention.gpu.mapped import TRITON
from linearize.attention.gpu.self_test import Case
from linearize.attention.kinds.feature_maps import MAPS, TINY, Elementwise, Favor
from linearize.attention.kinds.linear import TORCH, LinearState, RawState
from linearize.attention.kinds.mapped import mapped_attention
from linearize.attention.specs import ChunkedSpec, HybridSpec, LinearSpec
from linearize.kernels import FUSED_MAPS, Tile, linear_state, mapped_attend, state, tile_for, tuning

mapped_with_triton = partial(mapped_attention, engine=TRITON)

MAP = {"given": lambda x: x, "elu1": lambda x: F.elu(x) + 1, "relu": torch.relu}
LOG_MAP = {
    "logs": lambda x: x,
    "elu1": lambda x: MAP["elu1"](x).log(),
    "relu": lambda x: MAP["relu"](x).clamp_min(TINY).log(),
}
NAMES = ("query", "key", "value", "numbers", "state", "norm", "exact")
# queries, keys, head size, features, map, whether somebody else computed the exact part
CASES = {
    "one query, one key": (1, 1, 16, 8, "given", False),
    "one query": (1, 45, 16, 24, "given", False),
    "no exact keys": (21, 0, 16, 24, "given", False),
    "a whole step of keys": (16, 32, 16, 32, "given", False),
    "one more than a step": (17, 33, 16, 33, "given", False),
    "odd everything": (37, 75, 40, 24, "given", False),
    "many features": (18, 34, 64, 256, "given", False),
    "logs": (37, 75, 40, 24, "logs", False),
    "logs, one of each": (1, 1, 16, 1, "logs", False),
    "logs, one more than a step": (17, 33, 16, 33, "logs", False),
    "logs, no exact keys": (21, 0, 16, 24, "logs", False),
    "many logs": (18, 34, 64, 256, "logs", False),
    "fused elu1": (37, 45, 40, 40, "elu1", False),
    "fused relu": (19, 33, 64, 64, "relu", False),
    "fused, no exact keys": (19, 0, 24, 24, "elu1", False),
    "vendor's softmax": (21, 0, 16, 24, "given", True),
    "vendor's softmax, odd": (35, 0, 24, 50, "given", True),
}


def truth(query, key, value, numbers, total, norm, exact=None, *, scale, feature_map):
    """Return the definition in float64, with a maximum that is differentiated."""
    query, key, value, numbers, total, norm = (t.double() for t in (query, key, value, numbers, total, norm))
    if feature_map != "given":
        of_features = LOG_MAP[feature_map](numbers) + norm[:, :, None]
        scores = torch.cat((scale * query @ key.transpose(-1, -2), of_features), -1)
        return scores.softmax(-1) @ torch.cat((value, total), 2)
    phi = MAP[feature_map](numbers)
    numerator, denominator = phi @ total, phi @ norm[..., None]
    if exact is not None:
        numerator, denominator = numerator + exact.double(), denominator + 1
    elif key.shape[2]:
        scores = scale * query @ key.transpose(-1, -2)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        numerator, denominator = numerator + weights @ value, denominator + weights.sum(-1, keepdim=True)
    return numerator / denominator.clamp_min(1e-30)


def make(case, device, dtype, magnitude=1.0, weight=1.0):
    """Return the tensors of a case and the gradient of its output; `weight` is that of the linear keys."""
    queries, keys, size, features, name, has_exact = case
    generator = torch.Generator("cpu").manual_seed(queries + keys)

    def random(*shape, dtype=dtype):
        return torch.randn((2, 3, *shape), generator=generator, device="cpu").to(device, dtype)

    query, key, value = random(queries, size) * magnitude, random(keys, size), random(keys, size)
    numbers = random(queries, features)
    total = (random(features, size, dtype=torch.float32) + 0.5) * weight
    norm = random(features, dtype=torch.float32).abs() * weight + 0.1
    if name == "given":
        numbers = numbers.abs()
    else:  # means, and logs of norms
        total, norm = total / weight, norm + math.log(weight)
    tensors = [query, key, value, numbers, total, norm]
    return [*tensors, *([random(queries, size)] if has_exact else [])], random(queries, size)


def run(function, tensors, grad, **options):
    """Return the output and the gradients of all tensors, zero where there is none."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if function is mapped_attend and len(leaves) == 7:
        output = function(*leaves[:6], exact=leaves[6], **options)
    else:
        output = function(*leaves, **options)
    found = torch.autograd.grad(output, leaves, grad.to(output.dtype), allow_unused=True)
    return [output, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]


def compare(found, true, allowed, relative_error, factors=(1,) * 8):
    for name, mine, expected, factor in zip(("output", *NAMES), found, true, factors):  # noqa: B905
        assert bool(mine.isfinite().all()), name
        if expected.numel() and expected.norm() > 1e-6:
            assert relative_error(mine, expected) < factor * allowed, name
        else:  # a single key cancels
            assert mine.numel() == 0 or mine.abs().max() < 100 * allowed, name


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_the_definition(name, device, exact_dtype, relative_error, tolerance):
    case = CASES[name]
    tensors, grad = make(case, device, exact_dtype)
    options = {"scale": case[2] ** -0.5, "feature_map": case[4]}
    found, true = run(mapped_attend, tensors, grad, **options), run(truth, tensors, grad, **options)
    assert found[0].dtype == exact_dtype and found[0].is_contiguous()
    compare(found, true, tolerance[exact_dtype] * (1 if exact_dtype == torch.float32 else 2), relative_error)


@pytest.mark.parametrize("magnitude", [1, 30])
@pytest.mark.parametrize("weight", [1e-3, 1, 1e3])
def test_float16_where_exact_or_linear_keys_dominate(magnitude, weight, device, relative_error, tolerance):
    """The gradient of the maximum is a small difference where linear keys have most of the weight."""
    case = CASES["odd everything"]
    tensors, grad = make(case, device, torch.float16, magnitude, weight)
    options = {"scale": case[2] ** -0.5, "feature_map": "given"}
    found, true = run(mapped_attend, tensors, grad, **options), run(truth, tensors, grad, **options)
    compare(found, true, 2 * tolerance[torch.float16], relative_error)


@pytest.mark.parametrize("name", ["logs", "fused elu1"])
@pytest.mark.parametrize("magnitude", [1, 30])
@pytest.mark.parametrize("weight", [1e-30, 1, 1e30])
def test_float16_on_the_raw_scale_where_either_dominates(name, magnitude, weight, device, relative_error, tolerance):
    """Neither sort of keys overflows; one may vanish beside the other."""
    case = CASES[name]
    tensors, grad = make(case, device, torch.float16, magnitude, weight)
    options = {"scale": case[2] ** -0.5, "feature_map": case[4]}
    found, true = run(mapped_attend, tensors, grad, **options), run(truth, tensors, grad, **options)
    compare(found, true, 2 * tolerance[torch.float16], relative_error)


@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
@pytest.mark.parametrize("keys", [0, 45])
def test_the_raw_scale_has_no_zero(shift, keys, device, exact_dtype, relative_error, tolerance):
    """A factor on all weights changes nothing; here it is far beyond what float32 holds."""
    tensors, grad = make((19, keys, 16, 24, "logs", False), device, exact_dtype)
    query, key, value, numbers, mean, log_norm = tensors
    options = {"scale": 0.3, "feature_map": "logs"}
    near = run(truth, tensors, grad, **options)
    if keys:  # one more value, 1 in queries and the shift in keys
        query, key, value, mean = (F.pad(tensor, (0, 1)) for tensor in (query, key, value, mean))
        query[..., -1], key[..., -1] = 100, shift / (100 * options["scale"])
        grad = F.pad(grad, (0, 1))
    far = run(mapped_attend, [query, key, value, numbers.float(), mean, log_norm + shift], grad, **options)
    for name, mine, expected in zip(("output", *NAMES), far, near):  # noqa: B905
        mine = mine[..., : expected.shape[-1]] if mine.ndim == 4 else mine
        if expected.numel():
            assert relative_error(mine, expected) < (1e-2 if abs(shift) > 1e3 else 4e-3), name


@pytest.mark.parametrize("scale", [0.0, 1e-3, 2.0])
def test_scale_and_equal_keys(scale, device, exact_dtype, relative_error, tolerance):
    tensors, grad = make(CASES["one query"], device, exact_dtype)
    options = {"scale": scale, "feature_map": "given"}
    if scale:  # at 0 all keys are the largest
        found, true = run(mapped_attend, tensors, grad, **options), run(truth, tensors, grad, **options)
        compare(found, true, 2 * tolerance[exact_dtype], relative_error)
    for keys in (tensors[1] * 64, torch.ones_like(tensors[1]), torch.zeros_like(tensors[1])):
        other = [tensors[0], keys, *tensors[2:]]
        found, true = run(mapped_attend, other, grad, **options), run(truth, other, grad, **options)
        assert relative_error(found[0], true[0]) < 4 * tolerance[exact_dtype]
        assert all(bool(each.isfinite().all()) for each in found)
        # which of equal keys gets the gradient of the maximum is free; what they get together is not
        pairs = ((found[2].sum(2), true[2].sum(2)), (found[3], true[3]))
        assert all((mine - want).abs().max() < 100 * tolerance[exact_dtype] for mine, want in pairs)


def test_float16_features_and_states_beyond_its_range(device, relative_error, tolerance):
    tensors, grad = make(CASES["odd everything"], device, torch.float16)
    query, key, value, numbers, total, norm = tensors
    large = [query, key, value, numbers.float() * 1e6, total * 1e6, norm * 1e6]
    options = {"scale": 0.1, "feature_map": "given"}
    assert relative_error(mapped_attend(*large, **options), truth(*large, **options)) < 2 * tolerance[torch.float16]
    moderate = [query, key, value, numbers.float() * 1e3, total * 1e3, norm * 1e3]
    found, true = run(mapped_attend, moderate, grad, **options), run(truth, moderate, grad, **options)
    compare(found, true, 2 * tolerance[torch.float16], relative_error, (1, 1e9, 1e9, 1e9, 1, 1, 1))


def forms_of(tensors):
    """Return views of (B, H, N, D) tensors as callers pass them, with NaN in the memory between."""

    def wide(tensor):
        batch, heads, tokens, size = tensor.shape
        shape = (batch, tokens, 3 * heads * size + 40)
        fused = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = fused[..., heads * size : 2 * heads * size].unflatten(-1, (heads, size))
        return view.transpose(1, 2).copy_(tensor)

    return {
        "token-major": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors],
        "slices of a fused projection": [wide(t) for t in tensors],
        "values apart": [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors],
        "batch of one, expanded": [t[:1].expand(t.shape) for t in tensors],
    }


@pytest.mark.parametrize("name", ["one more than a step", "fused elu1", "vendor's softmax, odd"])
def test_strides(name, device, exact_dtype, relative_error, tolerance):
    case = CASES[name]
    tensors, grad = make(case, device, exact_dtype)
    options = {"scale": 0.3, "feature_map": case[4]}
    views = {
        form: [*views[:4], *tensors[4:6], *views[4:]] for form, views in forms_of(tensors[:4] + tensors[6:]).items()
    }
    for form, inputs in views.items():
        before = [view.clone() for view in inputs]
        found = run(mapped_attend, inputs, grad.transpose(1, 2).contiguous().transpose(1, 2), **options)
        compare(found, run(truth, before, grad, **options), 2 * tolerance[exact_dtype], relative_error)
        assert all(torch.equal(view, old) for view, old in zip(inputs, before, strict=True)), form


def test_offsets_beyond_32_bits(device, relative_error, tolerance):
    """Tokens 2^28 values apart: the last lies beyond 2^31. Pages that nobody touches take no memory."""
    if device.type != "cpu":
        pytest.skip("for memory that is lent when it is touched")
    size, tokens, step = 16, 10, 2**28
    try:
        memory = torch.from_numpy(np.zeros(step * (tokens - 1) + 3 * size, dtype=np.float16))
    except MemoryError:
        pytest.skip("this machine does not lend memory that is not used")
    fused = memory.as_strided((tokens, 3 * size), (step, 1))
    fused.copy_(torch.randn(fused.shape))
    query, key, value = (fused[:, part * size : (part + 1) * size][None, None] for part in range(3))
    total, norm = linear_state(key, value, "elu1")
    options = {"scale": 0.25, "feature_map": "elu1"}
    inputs = (query, key, value, query, total / norm[..., None], norm.log())
    found, true = mapped_attend(*inputs, **options), truth(*(each.contiguous() for each in inputs), **options)
    assert relative_error(found, true) < tolerance[torch.float16]


@pytest.mark.parametrize("name", MAP)
@pytest.mark.parametrize(("tokens", "features", "size"), [(1, 8, 16), (70, 24, 40), (99, 16, 64)])
def test_the_state(name, tokens, features, size, device, exact_dtype, relative_error, tolerance, monkeypatch):
    monkeypatch.setattr(state, "SHARE_TOKENS", 32)  # several shares of an odd size
    monkeypatch.setattr(state, "BACKWARD_TOKENS", 40)
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randn((1, 2, tokens, features), generator=generator, device="cpu").to(device, exact_dtype)
    value = torch.randn((1, 2, tokens, size), generator=generator, device="cpu").to(device, exact_dtype)
    results = []
    for function in (lambda x, v: linear_state(x, v, name), lambda x, v: definition_of_state(x, v, name)):
        leaves = [numbers.detach().requires_grad_(), value.detach().requires_grad_()]
        total, norm = function(*leaves)
        loss = (total * total.detach().cos()).sum() + (norm * 0.3).sum()
        results.append([total, norm, *torch.autograd.grad(loss, leaves)])
    assert results[0][0].dtype == results[0][1].dtype == torch.float32
    for mine, expected in zip(*results, strict=True):
        assert relative_error(mine, expected) < 2 * tolerance[exact_dtype]


def definition_of_state(numbers, value, name):
    phi = MAP[name](numbers.double())
    return phi.transpose(-1, -2) @ value.double(), phi.sum(2)


def test_two_runs_are_equal_bit_for_bit(device, exact_dtype, monkeypatch):
    monkeypatch.setattr(state, "SHARE_TOKENS", 8)
    case = CASES["fused elu1"]
    tensors, grad = make(case, device, exact_dtype)
    runs = [run(mapped_attend, tensors, grad, scale=0.2, feature_map="elu1") for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    first, second = (linear_state(tensors[0], tensors[0], "relu") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_operators_keep_pytorchs_rules(device, exact_dtype):
    for name in ("one query, one key", "logs, one of each", "vendor's softmax"):
        tensors, _ = make(CASES[name], device, exact_dtype)
        leaves = [tensor.requires_grad_() for tensor in tensors] + [None] * (7 - len(tensors))
        torch.library.opcheck(torch.ops.linearize.mapped_forward, (*leaves, 0.5, CASES[name][4]))
    torch.library.opcheck(torch.ops.linearize.linear_state, (leaves[0], leaves[0], "elu1"))


def test_torch_compile_needs_no_graph_break(device, exact_dtype):
    tensors, _ = make(CASES["fused elu1"], device, exact_dtype)
    inputs = [tensor.requires_grad_() for tensor in tensors[:3]]

    def block(query, key, value):
        total, norm = linear_state(key + 1, value, "elu1")
        held = (query, total / norm[..., None], norm.log())
        return 2 * mapped_attend(query, key, value, *held, scale=0.3, feature_map="elu1").flatten(2)

    compiled = torch.compile(block, backend="inductor" if inputs[0].is_cuda else "aot_eager", fullgraph=True)
    output, expected = compiled(*inputs), block(*inputs)
    assert torch.equal(output, expected)
    found, true = (torch.autograd.grad(result, inputs, torch.ones_like(output)) for result in (output, expected))
    assert all(torch.allclose(mine, other, rtol=1e-3, atol=1e-3) for mine, other in zip(found, true, strict=True))


def test_second_derivatives_are_refused_not_wrong(device, exact_dtype):
    tensors, _ = make(CASES["one query"], device, exact_dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output = mapped_attend(*leaves, scale=0.3)
    (first,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


LAYOUTS = {
    "clip": TokenLayout.of((grid_segment("main", 5, 3, 4), Segment("text", 3))),
    "two grids": TokenLayout.of(
        (Segment("text", 1), grid_segment("main", 3, 2, 3), grid_segment("reference", 2, 2, 2))
    ),
    "no text": TokenLayout.of((grid_segment("main", 1, 3, 13),)),
    "texts around": TokenLayout.of((Segment("text", 2), grid_segment("main", 3, 2, 3), Segment("pad", 5))),
}
SPECS = {
    "linear": LinearSpec(),
    "hybrid 1": HybridSpec(1),
    "hybrid 3": HybridSpec(3),
    "hybrid 2 lse": HybridSpec(2, stabilizer="lse"),
    "hybrid 2 common": HybridSpec(2, stabilizer="common"),
    "hybrid 1000": HybridSpec(1000),
    "chunked": ChunkedSpec(2, 1),
    "chunked causal": ChunkedSpec(2, 1, causal=True),
}


def kind(layout, name, device, dtype, size=16):
    """Return query, key, value, the gradient of the output, and maps with parameters that are no symmetric start."""
    generator = torch.Generator("cpu").manual_seed(1)
    maps = tuple(MAPS[name](2, size) for _ in range(2))
    for parameter in (parameter for each in maps for parameter in each.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.3)
    shape = (1, 2, layout.num_tokens, size)
    tensors = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(4)]
    return tensors[:3], tensors[3], tuple(each.to(device) for each in maps)


WITH_MAPS = [("polynomial", each) for each in SPECS]
WITH_MAPS += [("favor", each) for each in SPECS if each not in ("hybrid 1", "hybrid 2 lse", "hybrid 2 common")]
WITH_MAPS += [("elu1", "linear"), ("elu1", "hybrid 3"), ("relu", "hybrid 3"), ("relu", "chunked causal")]


@pytest.mark.parametrize(("name", "spec"), WITH_MAPS)
def test_kinds_equal_the_reference_with_gradients_of_maps(
    name, spec, device, exact_dtype, relative_error, tolerance, monkeypatch
):
    spec = SPECS[spec]
    monkeypatch.setattr(gpu_mapped, "CHUNK_VALUES", 1)
    monkeypatch.setattr(gpu_mapped, "MIN_PART", 17)  # several parts, and a short last one
    for layout in LAYOUTS.values():
        inputs, grad, maps = kind(layout, name, device, exact_dtype)
        parameters = [parameter for each in maps for parameter in each.parameters()]
        results = []
        for function in (mapped_with_triton, lambda *a: reference_attention(*a[:-1], maps=a[-1])):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            output = function(*leaves, layout, spec, maps)
            wanted = [*leaves, *parameters]
            grads = torch.autograd.grad(output, wanted, grad.to(output.dtype), allow_unused=True)
            results.append([output, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads))])  # noqa: B905
        for mine, expected in zip(*results, strict=True):
            if expected.norm() > 1e-6:
                assert relative_error(mine, expected) < 4 * tolerance[exact_dtype]
            else:
                assert mine.abs().max() < 100 * tolerance[exact_dtype]


@pytest.mark.parametrize("name", MAPS)
def test_every_map_runs(name, device, exact_dtype, relative_error, tolerance):
    layout = LAYOUTS["clip"]
    inputs, _, maps = kind(layout, name, device, exact_dtype)
    with torch.no_grad():
        found = mapped_with_triton(*inputs, layout, HybridSpec(3), maps, scale=-0.2)
        true = reference_attention(*inputs, layout, HybridSpec(3), scale=-0.2, maps=maps)
    assert relative_error(found, true) < 4 * tolerance[exact_dtype]


@pytest.mark.parametrize(
    ("name", "stabilizer"),
    [("hedgehog", "max"), ("hedgehog", "lse"), ("hedgehog", "common"), *((name, "max") for name in MAPS)],
)
def test_engines_have_equal_results_and_types(name, stabilizer, device, relative_error, tolerance):
    inputs, _, (phi_q, phi_k) = kind(LAYOUTS["clip"], name, device, torch.float16)
    query, key, value = inputs
    options = {"scale": 0.7, "stabilizer": stabilizer}
    states = [engine.summarise(key, value, phi_k, **options) for engine in (TORCH, TRITON)]
    empty = [engine.summarise(key[:, :, :0], value[:, :, :0], phi_k, **options) for engine in (TORCH, TRITON)]
    is_raw = phi_k.is_exponential or stabilizer == "common"
    for pair in (states, empty, [each + none for each, none in zip(states, empty, strict=True)]):
        assert all(type(each) is (RawState if is_raw else LinearState) for each in pair)
        for field in type(pair[0]).__slots__:
            theirs, mine = (getattr(each, field) for each in pair)
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)
    theirs, mine = (
        engine.mix(query, key[:, :, ::3], value[:, :, ::3], states[0], phi_q, **options) for engine in (TORCH, TRITON)
    )
    assert mine.dtype == theirs.dtype and relative_error(mine, theirs) < 2 * tolerance[torch.float16]
    assert TRITON.mix(query[:, :, :0], key, value, states[0], phi_q, **options).shape == (1, 2, 0, 16)


def test_maps_of_single_numbers_are_fused():
    assert [name for name in MAPS if issubclass(MAPS[name], Elementwise)] == list(FUSED_MAPS)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("favor", LinearSpec()), ("elu1", LinearSpec()), ("favor", HybridSpec(2)), ("relu", ChunkedSpec(2, 1)),
     ("hedgehog", HybridSpec(2, stabilizer="common"))],
)  # fmt: skip
def test_weights_sum_to_one_and_gradients_are_finite_at_any_norm(name, spec, device):
    for layout, norm in (("clip", 5), ("no text", 5), ("no text", 300)):
        layout = LAYOUTS[layout]
        (query, key, value), grad, maps = kind(layout, name, device, torch.float16, 128)
        inputs = [query * norm, key * norm, torch.ones_like(value)]
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = mapped_with_triton(*leaves, layout, spec, maps)
        assert (output - 1).abs().max() < 4e-3
        assert all(bool(each.isfinite().all()) for each in torch.autograd.grad(output, leaves, grad))


def test_features_exist_for_some_tokens_at_a_time_or_never(device, exact_dtype, monkeypatch):
    monkeypatch.setattr(gpu_mapped, "CHUNK_VALUES", 1)
    layout, seen = TokenLayout.of((grid_segment("main", 4, 7, 9),)), []
    logs = Favor.log_map
    monkeypatch.setattr(Favor, "log_map", lambda *args: seen.append(("favor", args[1].shape[2])) or logs(*args))
    for name in ("hedgehog", "favor", *FUSED_MAPS):
        inputs, _, maps = kind(layout, name, device, exact_dtype, 8)
        for each in maps:
            each.register_forward_hook(lambda module, args, output: seen.append((module.name, output.shape[2])))
        with torch.no_grad():
            mapped_with_triton(*inputs, layout, HybridSpec(2), maps)
    assert {called for called, _ in seen} == {"hedgehog", "favor"}
    assert max(tokens for _, tokens in seen) == 64 and layout.num_tokens == 252


def test_wrong_number_of_tokens_is_refused(device, exact_dtype):
    inputs, _, maps = kind(LAYOUTS["clip"], "elu1", device, exact_dtype)
    for spec in (LinearSpec(), HybridSpec(2), ChunkedSpec()):
        with pytest.raises(ValueError, match="63 tokens|63 where|has 63"):
            mapped_with_triton(*inputs, LAYOUTS["two grids"], spec, maps)


def test_the_kernels_pass_their_own_test(device, exact_dtype):
    for needs_grad in (False, True):
        case = Case(device, exact_dtype, 16, needs_grad)
        error = self_test.mapped_error(case)
        assert error < self_test.TOLERANCE[exact_dtype] / 2


@pytest.fixture
def untested(monkeypatch, device):
    monkeypatch.setattr(self_test.MAPPED, "results", {})
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return device


def test_wrong_results_and_errors_disable_the_kernels(untested, exact_dtype, monkeypatch, caplog):
    attend, case = gpu_mapped.mapped_attend, (untested, exact_dtype, 16)
    monkeypatch.setattr(gpu_mapped, "mapped_attend", lambda *args, **options: attend(*args, **options) * 1.05)
    for _ in range(2):
        reason = self_test.MAPPED.refusal(*case)
        assert reason is not None and "failed its self-test: its results are wrong by 5.0%" in reason.text
    assert len(caplog.records) == 1
    monkeypatch.setattr(self_test.MAPPED, "results", {})
    monkeypatch.setattr(gpu_mapped, "linear_state", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in self_test.MAPPED.refusal(*case).text
    monkeypatch.undo()
    assert self_test.MAPPED.refusal(untested, torch.float64, 16) is not None


def test_tiles_that_do_not_fit_are_replaced_without_those_of_clear(untested, exact_dtype, monkeypatch):
    class OutOfResources(Exception):
        pass

    monkeypatch.setattr(tuning, "_rungs", {})
    monkeypatch.setitem(tuning.MAPPED_TILES, "interpreted", {256: (Tile(32, 64, 4, 2),) * 5})
    attend, architecture = gpu_mapped.mapped_attend, "interpreted" if untested.type == "cpu" else None
    if architecture is None:
        pytest.skip("the tiles of a real card are its own")

    def small_device(*args, **options):
        if tile_for("mapped_forward", architecture, 16) != Tile(32, 32, 4, 1):
            raise OutOfResources
        return attend(*args, **options)

    monkeypatch.setattr(gpu_mapped, "mapped_attend", small_device)
    assert self_test.MAPPED.refusal(untested, exact_dtype, 16) is None
    assert tile_for("forward", architecture, 16) == Tile(16, 32, 4, 1)
