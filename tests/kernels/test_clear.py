"""CLEAR's kernels against the float64 oracle: forward, gradients, strides, offsets, poison. Compiled on a GPU, else
interpreted (float32 and float16 only, because the interpreter multiplies the bits of bfloat16)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Segment, TokenLayout, attention, grid_segment, radius_per_head, reference_attention
from linearize.attention.gpu.clear import clear_with_triton
from linearize.attention.kinds.reference import clear_mask
from linearize.attention.memory import LongLived
from linearize.attention.specs import ClearSpec

HALF = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def flux(rows, columns, text):
    return TokenLayout.of((Segment("text", text), grid_segment("main", 1, rows, columns)))


def video(frames, rows, columns, text=4):
    return TokenLayout.of((grid_segment("main", frames, rows, columns), Segment("text", text)))


TWO_GRIDS = (grid_segment("main", 1, 5, 11), Segment("text", 6), grid_segment("reference", 1, 7, 3))
BOTH_SIDES = (Segment("text", 3), grid_segment("main", 1, 7, 9), Segment("reference", 14))
CASES = {
    "one token": (flux(1, 1, 0), ClearSpec(1)),
    "one row": (flux(1, 61, 3), ClearSpec(4)),
    "one column": (flux(61, 1, 3), ClearSpec(4)),
    "primes": (flux(11, 13, 5), ClearSpec(5)),
    "self only": (flux(5, 17, 0), ClearSpec(1)),
    "no text": (flux(8, 13, 0), ClearSpec(5)),
    "one text token": (flux(8, 13, 1), ClearSpec(5)),
    "a step of text": (flux(5, 9, 32), ClearSpec(3)),
    "steps that all see": (flux(9, 13, 0), ClearSpec(7)),
    "radius beyond the grid": (flux(7, 9, 4), ClearSpec(100)),
    "radius almost the grid": (flux(7, 9, 4), ClearSpec(9)),
    "text on both sides": (TokenLayout.of(BOTH_SIDES), ClearSpec(3)),
    "two grids": (TokenLayout.of(TWO_GRIDS), ClearSpec(3)),
    "pooled": (flux(8, 12, 7), ClearSpec(3, down_factor=4)),
    "pooled ragged, two grids": (TokenLayout.of(TWO_GRIDS), ClearSpec(2, down_factor=4)),
    "pooled beyond the grid": (flux(5, 6, 2), ClearSpec(30, down_factor=2)),
    "video, every frame": (video(3, 5, 7), ClearSpec(3)),
    "video, near frames": (video(5, 5, 6), ClearSpec(4, 2)),
    "video, pooled": (video(3, 5, 7, 0), ClearSpec(3, 2, 3)),
    "proportional": (flux(7, 9, 7), ClearSpec(4, proportional=True)),
    "only text": (TokenLayout.of((Segment("text", 33),)), ClearSpec(4)),
    "huge radius": (video(6, 3, 4), ClearSpec(10**9, 2)),
    "huge in time": (video(6, 3, 5), ClearSpec(3, 10**9)),
    "a radius per head": (flux(7, 9, 5), radius_per_head((4, 100))),
}


@pytest.fixture
def qkv(device):
    def make(layout, heads=2, head_dim=8, batch=1, dtype=torch.float32, seed=0):
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (batch, heads, layout.num_tokens, head_dim)
        return tuple(torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(3))

    return make


def with_gradients(function, inputs, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def sdpa(layout, spec):
    """Return PyTorch's own attention under the explicit mask of a spec without pooled tokens."""

    def run(query, key, value):
        mask = clear_mask(layout, spec).to(query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=spec.scale(query.shape[-1], layout.num_tokens)
        )

    return run


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_the_oracle(name, qkv, exact_dtype, relative_error, tolerance):
    layout, spec = CASES[name]
    inputs = qkv(layout, dtype=exact_dtype)
    grad = torch.randn_like(inputs[0])
    found = with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec), inputs, grad)
    true = with_gradients(lambda *tensors: reference_attention(*tensors, layout, spec), inputs, grad)
    assert found[0].dtype == exact_dtype and found[0].transpose(1, 2).is_contiguous()
    allowed = tolerance[exact_dtype] * (1 if exact_dtype == torch.float32 else 2)
    for mine, expected in zip(found, true, strict=True):
        assert bool(mine.isfinite().all())
        if expected.norm() > 1e-6:  # where a token sees itself only, the softmax is constant
            assert relative_error(mine, expected) < allowed
        else:
            assert mine.abs().max() < 100 * allowed


@pytest.mark.parametrize("name", ["pooled ragged, two grids", "only text", "a radius per head"])
def test_an_empty_batch(name, qkv, exact_dtype):
    layout, spec = CASES[name]
    inputs = qkv(layout, batch=0, dtype=exact_dtype)
    found = with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec), inputs, inputs[0])
    assert all(each.shape == inputs[0].shape and each.dtype == exact_dtype for each in found)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("magnitude", [1, 16])
def test_half_precision_is_as_good_as_sdpa(dtype, magnitude, qkv, relative_error):
    layout, spec = flux(9, 12, 7), ClearSpec(5)
    query, key, value = qkv(layout, head_dim=64, dtype=dtype)
    inputs, grad = (query * magnitude, key, value), torch.randn_like(query)
    found = with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec), inputs, grad)
    true = with_gradients(lambda *tensors: reference_attention(*tensors, layout, spec), inputs, grad)
    baseline = with_gradients(sdpa(layout, spec), inputs, grad)
    for mine, other, expected, factor in zip(found, baseline, true, (1.5, 2, 2, 2), strict=True):
        assert relative_error(mine, expected) < factor * relative_error(other, expected)


@pytest.mark.parametrize("head_dim", [3, 16, 24, 96, 128, 256])
def test_head_sizes(head_dim, qkv, exact_dtype, relative_error, tolerance):
    layout, spec = flux(5, 7, 4), ClearSpec(3)
    inputs = qkv(layout, 1, head_dim, dtype=exact_dtype)
    grad = torch.randn_like(inputs[0])
    found = with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec), inputs, grad)
    true = with_gradients(lambda *tensors: reference_attention(*tensors, layout, spec), inputs, grad)
    for mine, expected in zip(found, true, strict=True):
        assert relative_error(mine, expected) < 2 * tolerance[exact_dtype]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 2.0, -0.3])
def test_scale(scale, qkv, exact_dtype, relative_error, tolerance):
    layout, spec = flux(5, 7, 4), ClearSpec(3)
    inputs = qkv(layout, dtype=exact_dtype)
    grad = torch.randn_like(inputs[0])
    found = with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec, scale=scale), inputs, grad)
    true = with_gradients(lambda *tensors: reference_attention(*tensors, layout, spec, scale=scale), inputs, grad)
    for mine, expected in zip(found, true, strict=True):
        if expected.norm() > 1e-6:
            assert relative_error(mine, expected) < 2 * tolerance[exact_dtype]
        else:
            assert mine.abs().max() < 1e-5


def forms_of(tensors):
    """Return views of (B, H, N, D) tensors as callers pass them, with NaN in the memory between."""
    query = tensors[0]
    batch, heads, tokens, size = query.shape

    def wide(index, tensor):
        fused = torch.full((batch, tokens, 3 * heads * size + 40), float("nan"), dtype=query.dtype, device=query.device)
        view = fused[..., index * heads * size : (index + 1) * heads * size].unflatten(-1, (heads, size))
        return view.transpose(1, 2).copy_(tensor)

    return {
        "token-major": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors],
        "slices of a fused projection": [wide(index, tensor) for index, tensor in enumerate(tensors)],
        "values apart": [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors],
        "heads last": [t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for t in tensors],
        "batch of one, expanded": [t[:1].expand(t.shape) for t in tensors],
    }


def test_strides_and_a_batch_of_three(qkv, exact_dtype, relative_error, tolerance):
    layout, spec = flux(5, 6, 3), ClearSpec(3)
    inputs, grad = qkv(layout, 2, 16, 3, exact_dtype), None
    for form, views in forms_of(inputs).items():
        before = [view.clone() for view in views]
        grad = torch.randn_like(before[0]).transpose(1, 2).contiguous().transpose(1, 2)
        found = with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec), views, grad)
        true = with_gradients(lambda *tensors: reference_attention(*tensors, layout, spec), before, grad)
        for mine, expected in zip(found, true, strict=True):
            assert relative_error(mine, expected) < 2 * tolerance[exact_dtype], form
        assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True)), "an input was written into"


def test_offsets_beyond_32_bits(device, relative_error, tolerance):
    """Tokens 2^28 values apart: the last lies beyond 2^31. Pages that nobody touches take no memory."""
    if device.type != "cpu":
        pytest.skip("on a GPU the test of 8192 x 8192 pixels does this")
    layout, spec, size, step = flux(3, 4, 2), ClearSpec(2), 16, 2**28
    try:
        memory = torch.from_numpy(np.zeros(step * (layout.num_tokens - 1) + 3 * size, dtype=np.float16))
    except MemoryError:
        pytest.skip("this machine does not lend memory that is not used")
    fused = memory.as_strided((layout.num_tokens, 3 * size), (step, 1))
    fused.copy_(torch.randn(fused.shape))
    inputs = [fused[:, part * size : (part + 1) * size][None, None] for part in range(3)]
    output = clear_with_triton(*inputs, layout, spec)
    truth = reference_attention(*(tensor.contiguous() for tensor in inputs), layout, spec)
    assert relative_error(output, truth) < tolerance[torch.float16]


def test_keys_outside_every_window_of_a_tile_are_not_read(qkv, exact_dtype):
    """The sparse path ran: a NaN in the last value reaches only tiles whose windows touch it, and the text."""
    layout, spec = flux(16, 8, 5), ClearSpec(3)
    query, key, value = qkv(layout, dtype=exact_dtype)
    clean = clear_with_triton(query, key, value, layout, spec)
    value[:, :, -1] = float("nan")
    poisoned = clear_with_triton(query, key, value, layout, spec)
    first_rows = slice(5, 5 + 2 * 8)
    assert torch.equal(poisoned[:, :, first_rows], clean[:, :, first_rows])
    assert bool(poisoned[:, :, -1].isnan().all()) and bool(poisoned[:, :, :5].isnan().all())


def test_large_logits_and_equal_keys(qkv, exact_dtype, relative_error, tolerance):
    layout, spec = flux(7, 9, 5), ClearSpec(3)
    query, key, value = qkv(layout, dtype=exact_dtype)
    for keys in (key * 64, torch.ones_like(key), torch.zeros_like(key)):
        output = clear_with_triton(query, keys, value, layout, spec)
        truth = reference_attention(query, keys, value, layout, spec)
        assert relative_error(output, truth) < 4 * tolerance[exact_dtype]


def test_two_runs_are_equal_bit_for_bit(qkv, exact_dtype):
    layout, spec = flux(7, 9, 5), ClearSpec(3)
    inputs = qkv(layout, dtype=exact_dtype)
    runs = [
        with_gradients(lambda *tensors: clear_with_triton(*tensors, layout, spec), inputs, torch.ones_like(inputs[0]))
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_pooling_weights_get_gradients(qkv, exact_dtype, relative_error, tolerance):
    layout, spec = flux(5, 7, 2), ClearSpec(2, down_factor=2)
    inputs = qkv(layout, dtype=exact_dtype)
    weight = torch.rand(2, 2, device=inputs[0].device, requires_grad=True)
    grad = torch.randn_like(inputs[0])
    found, true = (
        torch.autograd.grad(run(*inputs, layout, spec, pool_weight=weight), weight, given)[0]
        for run, given in ((clear_with_triton, grad), (reference_attention, grad.double()))
    )
    assert relative_error(found, true) < 4 * tolerance[exact_dtype]


def test_the_statistics_are_the_log_of_the_sums(qkv, exact_dtype):
    from linearize.attention.gpu.clear import _tables

    layout, spec = flux(5, 7, 4), ClearSpec(3)
    query, key, value = qkv(layout, dtype=exact_dtype)
    (table,) = _tables(layout, ((3, 0), (3, 0)), (), query, False, LongLived())
    _, lse = torch.ops.linearize.clear_forward(query, key, value, table.tensors, table.numbers, 0.5)
    scores = 0.5 * query.double() @ key.double().transpose(-1, -2)
    hidden = ~clear_mask(layout, spec).to(query.device)
    truth = scores.masked_fill(hidden, float("-inf")).logsumexp(-1) / np.log(2)
    torch.testing.assert_close(lse.double(), truth, atol=1e-3 if exact_dtype == torch.float16 else 1e-5, rtol=1e-5)


def test_tables_are_kept_and_shared_between_passes(qkv, exact_dtype):
    layout, memory = flux(5, 7, 4), LongLived()
    inputs = [tensor.requires_grad_() for tensor in qkv(layout, dtype=exact_dtype)]
    for _ in range(2):
        clear_with_triton(*inputs, layout, ClearSpec(3), memory=memory).sum().backward()
    tiles = {key[5] for key in memory._values}
    assert len(memory._values) == len(tiles), "queries and keys have the same table where their tiles are equal"
    with torch.inference_mode():  # what was made there is used for training next
        clear_with_triton(*(tensor.detach() for tensor in inputs), layout, ClearSpec(2), memory=memory)
    clear_with_triton(*inputs, layout, ClearSpec(2), memory=memory).sum().backward()


def test_torch_compile_needs_no_graph_break(qkv, exact_dtype):
    from linearize.attention.gpu.clear import _tables
    from linearize.kernels import attend

    layout = flux(5, 7, 4)
    inputs = [tensor.requires_grad_() for tensor in qkv(layout, dtype=exact_dtype)]
    tables = _tables(layout, ((3, 0), (4, 0)), (), inputs[0], True, LongLived())

    def block(query, key, value):
        return 2 * attend(query + 1, key, value, tables, 0.3).transpose(1, 2).flatten(2)

    compiled = torch.compile(block, backend="inductor" if inputs[0].is_cuda else "aot_eager", fullgraph=True)
    output, expected = compiled(*inputs), block(*inputs)
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    found, true = (torch.autograd.grad(result, inputs, grad) for result in (output, expected))
    assert all(torch.equal(mine, other) for mine, other in zip(found, true, strict=True))


def test_the_operators_keep_pytorchs_rules(qkv, exact_dtype):
    from linearize.attention.gpu.clear import _tables

    layout = flux(3, 4, 2)
    inputs = [tensor.requires_grad_() for tensor in qkv(layout, 1, dtype=exact_dtype)]
    tables = _tables(layout, ((2, 0),), (), inputs[0], True, LongLived())
    tensors, numbers = [t for table in tables for t in table.tensors], [n for table in tables for n in table.numbers]
    torch.library.opcheck(torch.ops.linearize.clear_forward, (*inputs, tensors, numbers, 0.5))


def test_second_derivatives_are_refused_not_wrong(qkv, exact_dtype):
    layout, spec = flux(3, 4, 2), ClearSpec(2)
    inputs = [tensor.requires_grad_() for tensor in qkv(layout, dtype=exact_dtype)]
    (first,) = torch.autograd.grad(clear_with_triton(*inputs, layout, spec).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


def test_wrong_number_of_tokens_is_refused(qkv, exact_dtype):
    layout = flux(4, 4, 3)
    query, key, value = qkv(layout, dtype=exact_dtype)
    with pytest.raises(ValueError, match="18 tokens where 3 text \\+ 16 main = 19"):
        clear_with_triton(query, key[:, :, :-1], value, layout, ClearSpec(2))
    with pytest.raises(ValueError, match="have one shape, got"):
        clear_with_triton(query, key[:, :1], value, layout, ClearSpec(2))


def test_through_the_front_door(qkv, exact_dtype, relative_error, tolerance, trusted):
    layout = flux(7, 9, 5)
    inputs = qkv(layout, 3, dtype=exact_dtype)
    for spec in (ClearSpec(4), ClearSpec(3, down_factor=2), radius_per_head((2, 9, 4))):
        output = attention(*inputs, layout, spec, backend="triton")
        assert relative_error(output, reference_attention(*inputs, layout, spec)) < 2 * tolerance[exact_dtype]
        torch_output = attention(*inputs, layout, spec, backend="torch")
        torch.testing.assert_close(output, torch_output, atol=5e-3, rtol=5e-3)
