"""Thousands of random layouts, specs, dtypes and strides: CLEAR in PyTorch against the float64 oracle."""

import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.attention import Segment, TokenLayout, attention, grid_segment, reference_attention
from linearize.attention.kinds.reference import clear_mask
from linearize.attention.planning.cost import attention_cost
from linearize.attention.specs import ClearSpec, groups_of, radius_per_head

CASES = 100_000 if os.environ.get("LINEARIZE_TEST_ALL") else 3_000
GRADIENT_CASES = CASES // 10

grids = st.one_of(
    st.tuples(st.just(1), st.integers(1, 26), st.integers(1, 26)),
    st.tuples(st.integers(2, 4), st.integers(1, 9), st.integers(1, 9)),
)
segments = st.one_of(
    st.builds(Segment, st.sampled_from(["text", "reference", "pad"]), st.integers(0, 20)),
    grids.map(lambda grid: grid_segment("main", *grid)),
)
layouts = st.lists(segments, min_size=1, max_size=4).map(TokenLayout.of).filter(lambda layout: layout.num_tokens > 0)
specs = st.builds(
    ClearSpec,
    st.one_of(st.integers(1, 10), st.just(40)),
    st.sampled_from([0, 0, 0, 1, 2, 5]),
    st.sampled_from([1, 1, 1, 2, 3, 4]),
    st.booleans(),
)


@st.composite
def cases(draw):
    """Return (layout, spec, inputs, scale, pooling weight)."""
    layout, spec, heads = draw(layouts), draw(specs), draw(st.integers(1, 3))
    if draw(st.booleans()) and heads > 1:
        spec = radius_per_head(tuple(draw(st.integers(1, 9)) for _ in range(heads)), spec)
    head_dim, batch = draw(st.sampled_from([3, 8, 16])), draw(st.integers(1, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = draw(st.sampled_from([0.1, 1.0, 4.0]))
    inputs = tuple(_strided(draw, (batch, heads, layout.num_tokens, head_dim), generator, dtype) for _ in range(3))
    inputs = (inputs[0] * magnitude, *inputs[1:])
    scale = draw(st.sampled_from([None, None, 0.3]))
    down_factor = groups_of(spec, heads)[0].spec.down_factor
    weight = torch.randn(down_factor, down_factor, generator=generator) if draw(st.booleans()) else None
    return layout, spec, inputs, scale, weight


def _strided(draw, shape, generator, dtype):
    """Return a random tensor that is contiguous, token-major, a slice of a wider one, or expanded over the batch."""
    batch, heads, tokens, head_dim = shape
    form = draw(st.sampled_from(["contiguous", "token-major", "slice", "expanded"]))
    if form == "token-major":
        return torch.randn(batch, tokens, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    if form == "slice":
        wide = torch.randn(batch, tokens, heads * head_dim + 5, generator=generator).to(dtype)
        return wide[..., 2 : 2 + heads * head_dim].unflatten(-1, (heads, head_dim)).transpose(1, 2)
    if form == "expanded":
        return torch.randn(1, heads, tokens, head_dim, generator=generator).to(dtype).expand(shape)
    return torch.randn(shape, generator=generator).to(dtype)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(cases())
def test_forward(tolerance, relative_error, case):
    layout, spec, inputs, scale, weight = case
    output = attention(*inputs, layout, spec, scale=scale, pool_weight=weight)
    truth = reference_attention(*inputs, layout, spec, scale=scale, pool_weight=weight)
    assert output.dtype == inputs[0].dtype
    assert bool(output.isfinite().all())
    error, dtype = relative_error(output, truth), inputs[0].dtype
    allowed = tolerance[dtype]
    if dtype in (torch.float16, torch.bfloat16):
        allowed = max(allowed, 1.5 * _sdpa_error(relative_error, truth, case))
    assert error <= allowed, f"{error} > {allowed}"


def _sdpa_error(relative_error, truth, case):
    """Return the error of PyTorch's own masked attention in the same dtype, pooled tokens left out of both."""
    layout, spec, inputs, scale, _ = case
    heads = inputs[0].shape[1]
    if any(group.spec.down_factor > 1 for group in groups_of(spec, heads)):
        return 0.03  # the pooled keys are rounded to the dtype as well; there is no call of PyTorch to compare with
    output = torch.empty_like(inputs[0])
    for group in groups_of(spec, heads):
        chosen = [tensor[:, list(group.heads)] for tensor in inputs]
        own = group.spec.scale(chosen[0].shape[-1], layout.num_tokens) if scale is None else scale
        mask = clear_mask(layout, group.spec)
        output[:, list(group.heads)] = F.scaled_dot_product_attention(*chosen, attn_mask=mask, scale=own)
    return relative_error(output, truth)


@settings(
    max_examples=GRADIENT_CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
@given(cases())
def test_gradients(case):
    layout, spec, inputs, scale, weight = case
    leaves = [tensor.double().clone().requires_grad_() for tensor in inputs]
    if weight is not None:
        weight = weight.double().requires_grad_()
    output = attention(*leaves, layout, spec, scale=scale, pool_weight=weight)
    truth = reference_attention(*leaves, layout, spec, scale=scale, pool_weight=weight)
    grad = torch.randn_like(output)
    wanted = leaves if weight is None else [*leaves, weight]
    found, true = (torch.autograd.grad(result, wanted, grad, allow_unused=True) for result in (output, truth))
    for mine, expected in zip(found, true, strict=True):
        if expected is None:
            assert mine is None or mine.abs().max() == 0
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=CASES // 10, deadline=None, derandomize=True, database=None)
@given(layouts, specs)
def test_pairs_equal_the_mask(layout, spec):
    plain = ClearSpec(spec.radius, spec.temporal_radius)
    assert attention_cost(plain, layout, 1, 8).pairs == int(clear_mask(layout, plain).sum())
