"""Random layouts, specs, strides and magnitudes: CLEAR's kernels against the float64 oracle, forward and gradients."""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.attention import Segment, TokenLayout, grid_segment, reference_attention
from linearize.attention.gpu.clear import clear_with_triton
from linearize.attention.specs import ClearSpec, groups_of, radius_per_head

CASES = 600 if os.environ.get("LINEARIZE_TEST_ALL") or torch.cuda.is_available() else 30

grids = st.one_of(
    st.tuples(st.just(1), st.integers(1, 13), st.integers(1, 13)),
    st.tuples(st.integers(2, 4), st.integers(1, 5), st.integers(1, 5)),
)
segments = st.one_of(
    st.builds(Segment, st.sampled_from(["text", "reference", "pad"]), st.sampled_from([1, 5, 32, 40])),
    grids.map(lambda grid: grid_segment("main", *grid)),
)
layouts = st.lists(segments, min_size=1, max_size=3).map(TokenLayout.of)
specs = st.builds(
    ClearSpec,
    st.sampled_from([1, 2, 3, 5, 8, 16]),
    st.sampled_from([0, 0, 1, 2, 5]),
    st.sampled_from([1, 1, 2, 4]),
    st.booleans(),
)


@st.composite
def cases(draw):
    """Return layout, spec, shape, form of the inputs, magnitude of the queries, seed, scale."""
    layout, spec, heads = draw(layouts), draw(specs), draw(st.integers(1, 3))
    if heads > 1 and draw(st.booleans()):
        spec = radius_per_head(tuple(draw(st.integers(1, 9)) for _ in range(heads)), spec)
    shape = (draw(st.integers(1, 2)), heads, layout.num_tokens, draw(st.sampled_from([8, 16, 24])))
    form = draw(st.sampled_from(["contiguous", "token-major", "slice", "expanded"]))
    return (
        layout,
        spec,
        shape,
        form,
        draw(st.sampled_from([0.1, 1, 8])),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([None, None, 0.3])),
    )


def inputs_of(shape, form, magnitude, seed, device, dtype):
    batch, heads, tokens, size = shape
    generator = torch.Generator("cpu").manual_seed(seed)

    def random():
        tensor = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        if form == "token-major":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if form == "slice":
            wide = torch.full((batch, tokens, heads * size + 5), float("nan"), device=device, dtype=dtype)
            return wide[..., 2 : 2 + heads * size].unflatten(-1, (heads, size)).transpose(1, 2).copy_(tensor)
        return tensor[:1].expand(shape) if form == "expanded" else tensor

    query, key, value, grad = (random() for _ in range(4))
    return [query * magnitude, key, value], grad


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(case=cases())
def test_forward_and_gradients(device, exact_dtype, case):
    layout, spec, shape, form, magnitude, seed, scale = case
    inputs, grad = inputs_of(shape, form, magnitude, seed, device, exact_dtype)
    downs = {group.spec.down_factor for group in groups_of(spec, shape[1])}
    weight = torch.full((max(downs),) * 2, 0.3, device=device) if max(downs) > 1 else None
    results = []
    for run in (clear_with_triton, reference_attention):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = run(*leaves, layout, spec, scale=scale, pool_weight=weight)
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))])
    # half precision rounds pooled keys too, and logits of a hundred
    allowed = 2e-5 if exact_dtype == torch.float32 else 2e-2
    for mine, true in zip(*results, strict=True):
        assert bool(mine.isfinite().all())
        assert float((mine.double() - true).detach().norm()) <= allowed * max(float(true.detach().norm()), 1.0)
