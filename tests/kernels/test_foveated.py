"""Foveated attention's kernels against the float64 oracle with an explicit choice: outputs, gradients, strides.

Compiled on a GPU, else interpreted (float32 and float16 only, because the interpreter multiplies the bits of bfloat16).
"""

import numpy as np
import pytest
import torch

from linearize.attention import Segment, TokenLayout, attention, grid_segment
from linearize.attention.gpu.foveated import foveated_refusal, foveated_with_triton
from linearize.attention.kinds.foveated import foveated_attention, tiles_of
from linearize.attention.kinds.foveated_reference import foveated_reference
from linearize.attention.memory import LongLived
from linearize.attention.specs import FoveatedSpec, HeadGroup, HeadSplit
from linearize.kernels.foveated import foveated_attend
from linearize.kernels.foveated_table import blocks_of_means, foveated_table, turned


def picture(rows, columns, text=5):
    return TokenLayout.of((Segment("text", text), grid_segment("main", 1, rows, columns)))


BETWEEN = (grid_segment("main", 1, 6, 9), Segment("text", 4), grid_segment("reference", 1, 7, 3))
CLIP = (grid_segment("main", 3, 3, 5), grid_segment("reference", 1, 3, 5), Segment("text", 3))
CASES = {
    "near and chosen": (TokenLayout.of(BETWEEN), FoveatedSpec(radius=1, top=0.3)),
    "chosen alone, no text": (picture(5, 9, 0), FoveatedSpec(radius=0, top=0.3)),
    "near alone, whole tiles": (picture(8, 8), FoveatedSpec(radius=5, top=0.0)),
    "tiles of more rows than a block": (picture(9, 11, 34), FoveatedSpec(radius=1, top=0.2, tile=8)),
    "odd tiles of a clip": (TokenLayout.of(CLIP), FoveatedSpec(radius=2, top=0.2, tile=3, frames=2)),
    "levels": (picture(9, 13, 3), FoveatedSpec(radius=2, top=0.0, levels=3)),
    "levels and chosen": (TokenLayout.of(CLIP), FoveatedSpec(radius=1, top=0.15, levels=2, frames=0)),
    "everything": (TokenLayout.of(BETWEEN), FoveatedSpec(radius=1, top=1.0)),
    "one token": (picture(1, 1, 2), FoveatedSpec()),
    "only text": (TokenLayout.of((Segment("text", 33),)), FoveatedSpec()),
    "only text, levels": (TokenLayout.of((Segment("text", 5),)), FoveatedSpec(levels=2)),
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


def compare(inputs, layout, spec, allowed, relative_error, scale=None):
    """Compare output and gradients with those of the oracle for the same choice."""
    choice, grad = tiles_of(*inputs, layout, spec, scale=scale), torch.randn_like(inputs[0])
    found = with_gradients(
        lambda *qkv: foveated_with_triton(*qkv, layout, spec, scale=scale, choice=choice), inputs, grad
    )
    true = with_gradients(lambda *qkv: foveated_reference(*qkv, layout, spec, scale, choice), inputs, grad)
    for mine, expected in zip(found, true, strict=True):
        assert mine.dtype == inputs[0].dtype and bool(mine.isfinite().all())
        if expected.norm() > 1e-6:
            assert relative_error(mine, expected) < allowed
        else:
            assert mine.abs().max() < 100 * allowed


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_oracle(name, qkv, exact_dtype, relative_error, tolerance):
    layout, spec = CASES[name]
    heads = 2 if name == "near and chosen" else 1  # the interpreter is slow
    compare(qkv(layout, heads, dtype=exact_dtype), layout, spec, 2 * tolerance[exact_dtype], relative_error)


@pytest.mark.parametrize(("head_dim", "scale"), [(3, None), (24, -0.3), (128, 0.0)])
def test_head_sizes_and_scales(head_dim, scale, qkv, exact_dtype, relative_error, tolerance):
    layout, spec = picture(5, 7, 2), FoveatedSpec(radius=1, top=0.3)
    inputs = qkv(layout, 1, head_dim, dtype=exact_dtype)
    compare(inputs, layout, spec, 2 * tolerance[exact_dtype], relative_error, scale)


def test_strides_and_a_batch(qkv, exact_dtype, relative_error, tolerance):
    layout, spec = picture(6, 9, 3), FoveatedSpec(radius=1, top=0.2)
    batch, heads, tokens, size = 2, 2, layout.num_tokens, 16
    fused = torch.full((batch, tokens, 3 * heads * size + 40), float("nan"), dtype=exact_dtype)
    views = []
    for index, tensor in enumerate(qkv(layout, heads, size, batch, exact_dtype)):
        fused = fused.to(tensor.device)
        view = fused[..., index * heads * size : (index + 1) * heads * size].unflatten(-1, (heads, size))
        views.append(view.transpose(1, 2).copy_(tensor))
    before = [view.clone() for view in views]
    compare(views, layout, spec, 2 * tolerance[exact_dtype], relative_error)
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True)), "an input was written into"


@pytest.mark.parametrize("spec", (FoveatedSpec(radius=1, top=0.2), FoveatedSpec(radius=1, top=0.2, levels=3)))
def test_what_a_site_learned_is_used_and_gets_gradients(spec, qkv, exact_dtype, relative_error, tolerance):
    layout = picture(6, 9, 3)
    inputs = qkv(layout, 2, dtype=exact_dtype)
    torch.manual_seed(1)
    learned = [torch.randn(shape, device=inputs[0].device) for shape in spec.learned_shapes(2).values()]
    choice, grad = tiles_of(*inputs, layout, spec), torch.randn_like(inputs[0])

    def mine(query, key, value, bias, logits):
        options = {"choice": choice, "bias": bias, "pool_logits": logits}
        return foveated_with_triton(query, key, value, layout, spec, **options)

    def oracle(query, key, value, bias, logits):
        return foveated_reference(query, key, value, layout, spec, None, choice, bias, logits)

    assert list(spec.learned_shapes(2)) == ["bias", "pool_logits"]
    found, true = (with_gradients(run, [*inputs, *learned], grad) for run in (mine, oracle))
    for got, expected in zip(found, true, strict=True):
        assert relative_error(got, expected) < 4 * tolerance[exact_dtype]


def test_half_precision_is_as_good_as_torch(qkv, relative_error):
    layout, spec, dtype = picture(9, 12, 7), FoveatedSpec(radius=1, top=0.2), torch.float16
    inputs = qkv(layout, 1, 64, dtype=dtype)
    choice, grad = tiles_of(*inputs, layout, spec), torch.randn_like(inputs[0])
    mine, other, true = (
        with_gradients(run, inputs, grad)
        for run in (
            lambda *qkv: foveated_with_triton(*qkv, layout, spec, choice=choice),
            lambda *qkv: foveated_attention(*qkv, layout, spec, choice=choice),
            lambda *qkv: foveated_reference(*qkv, layout, spec, None, choice),
        )
    )
    # the torch backend computes in fp32 throughout, and rounds means and results alone
    for found, torch_found, expected in zip(mine, other, true, strict=True):
        assert relative_error(found, expected) < max(2 * relative_error(torch_found, expected), 1e-3)


def hand_made(device, dtype, listed):
    """Return inputs and a table of 40 tokens, 3 of them global; 2 tiles, 6 cells, 35 means that are not of any cell."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 16, device=device, dtype=dtype) for _ in range(3))
    means = [torch.randn(1, 2, 35, 16, device=device, dtype=dtype) for _ in range(2)]
    ids = torch.arange(3, 40, device=device)
    tiles = torch.cat([ids, ids.new_full((1,), -1)]).view(2, 19)
    cells = torch.cat([ids, ids.new_full((5,), -1)]).view(6, 7)
    exact = torch.tensor([[[5, 2, -1], [0, 3, 5]], [[1, 4, 0], [-1, 2, -1]]], device=device)
    if not listed:  # what is hidden is named by cells, of which there are more then
        return (query, key, value, *means), foveated_table(ids[:0] + 3, tiles, cells, exact, None, 35)
    seen = torch.tensor([[[0, 1, 31, 32], [34, 5, -1, -1]], [[2, -1, -1, -1], [33, 0, 4, -1]]], device=device)
    return (query, key, value, *means), foveated_table(torch.arange(3, device=device), tiles, cells, exact, seen, 35)


def dense_of(query, key, value, mean_key, mean_value, bias, table, scale):
    """Return what the table says, with a mask of every pair."""
    places = table.queries.tolist()
    tiles = {token: (place - table.num_globals) // table.tile_size for place, token in enumerate(places) if token >= 0}
    members = table.keys[table.num_globals :].view(-1, table.cell_size).tolist()
    mask = torch.zeros(2, 40, 40 + 35, dtype=torch.bool, device=query.device)
    for head in range(2):
        for token, tile in tiles.items():
            if tile < 0:
                mask[head, token, :40] = True
                continue
            exact = [each for cell in table.cell_ids[head, tile].tolist() if cell >= 0 for each in members[cell]]
            seen = [each for each in table.mean_ids[head, tile].tolist() if each >= 0]
            mask[head, token, [*range(table.num_globals), *(each for each in exact if each >= 0)]] = True
            mask[head, token, [40 + each for each in seen]] = True
    keys, values = (torch.cat(pair, 2).double() for pair in ((key, mean_key), (value, mean_value)))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    scores = scores + torch.cat([scores.new_zeros(2, 1, 40), bias.double()[:, None]], 2)
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ values


def test_a_bias_per_head_and_every_gradient(device, exact_dtype, relative_error, tolerance):
    inputs, table = hand_made(device, exact_dtype, True)
    bias, grad = torch.randn(2, 35, device=device), torch.randn_like(inputs[0])
    leaves = (*inputs, bias)
    found = with_gradients(lambda *given: foveated_attend(*given, table, 0.4), leaves, grad)
    true = with_gradients(lambda *given: dense_of(*given, table, 0.4), leaves, grad)
    for mine, expected in zip(found, true, strict=True):
        assert relative_error(mine, expected) < 2 * tolerance[exact_dtype]
    shared = with_gradients(lambda *given: foveated_attend(*given, table, 0.4), (*inputs, bias[0]), grad)
    assert shared[-1].shape == (35,), "one bias for all heads has one gradient"


def test_two_runs_are_equal_bit_for_bit_and_keys_that_are_not_seen_are_not_read(device, exact_dtype):
    inputs, table = hand_made(device, exact_dtype, True)
    leaves, grad = (*inputs, torch.zeros(35, device=device)), torch.ones_like(inputs[0])
    runs = [with_gradients(lambda *given: foveated_attend(*given, table, 0.4), leaves, grad) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    inputs[2][:, :, 10:17] = float("nan")  # cell 1, which the second head's first tile alone sees
    inputs[4][:, :, 31] = float("nan")
    poisoned = foveated_attend(*inputs, leaves[5], table, 0.4)
    clean = torch.ones(2, 40, dtype=torch.bool, device=device)
    clean[:, :3] = clean[0, 3:22] = clean[1, 3:22] = False
    assert torch.equal(poisoned[0][clean], runs[0][0][0][clean]) and bool(poisoned[0][~clean].isnan().all())


def test_lists_turned_around_name_the_same_pairs(device):
    _, table = hand_made(device, torch.float32, True)
    lists = turned(table.cell_ids, 6, 2)
    for head in range(2):
        pairs = {(tile, cell) for tile in range(2) for cell in table.cell_ids[head, tile].tolist() if cell >= 0}
        mine = set()
        for cell, (first, count, _) in enumerate(lists.fields[head].tolist()):
            mine |= {(tile, cell) for tile in lists.ids.flatten()[first : first + count].tolist()}
        assert mine == pairs
    blocks, hidden, words = blocks_of_means(table, 35, 32, 2)
    for head in range(2):
        for tile in range(2):
            start, seen = int(words[head, tile]), set(table.mean_ids[head, tile].tolist()) - {-1}
            bits = hidden.flatten()[start : start + 2].tolist()
            assert {mean for mean in range(35) if not bits[mean // 32] >> mean % 32 & 1} == seen
    assert blocks.fields[..., 1].tolist() == [[2, 2], [2, 1]]


def test_offsets_beyond_32_bits(device, relative_error, tolerance):
    """Tokens 2^28 values apart: the last lies beyond 2^31. Pages that nobody touches take no memory."""
    if device.type != "cpu":
        pytest.skip("on a GPU the large pictures do this")
    layout, spec, size, step = picture(3, 4, 2), FoveatedSpec(radius=1, top=0.2, tile=2), 16, 2**28
    try:
        memory = torch.from_numpy(np.zeros(step * (layout.num_tokens - 1) + 3 * size, dtype=np.float16))
    except MemoryError:
        pytest.skip("this machine does not lend memory that is not used")
    fused = memory.as_strided((layout.num_tokens, 3 * size), (step, 1))
    fused.copy_(torch.randn(fused.shape))
    inputs = [fused[:, part * size : (part + 1) * size][None, None] for part in range(3)]
    output = foveated_with_triton(*inputs, layout, spec)
    choice = tiles_of(*inputs, layout, spec)
    truth = foveated_reference(*(tensor.contiguous() for tensor in inputs), layout, spec, None, choice)
    assert relative_error(output, truth) < tolerance[torch.float16]


def test_an_empty_batch(qkv, exact_dtype):
    layout, spec = picture(5, 7, 2), FoveatedSpec(radius=1, top=0.3)
    inputs = qkv(layout, batch=0, dtype=exact_dtype)
    found = with_gradients(lambda *qkv: foveated_with_triton(*qkv, layout, spec), inputs, inputs[0])
    assert all(each.shape == inputs[0].shape and each.dtype == exact_dtype for each in found)


@pytest.mark.parametrize("run", [foveated_attention, foveated_with_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("spec", [FoveatedSpec(1, 0.3), FoveatedSpec(1, 0.0, levels=2)], ids=["one level", "two"])
def test_a_table_made_while_sampling_serves_training(run, spec, qkv, exact_dtype):
    layout, memory = picture(5, 6, 2), LongLived()
    inputs = qkv(layout, 1, dtype=exact_dtype)
    with torch.inference_mode():
        run(*inputs, layout, spec, memory=memory)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    run(*leaves, layout, spec, memory=memory).sum().backward()
    assert len(memory._values) == 1 and all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_the_operators_keep_pytorchs_rules_and_refuse_second_derivatives(device, exact_dtype):
    inputs, table = hand_made(device, exact_dtype, True)
    leaves = [tensor.requires_grad_() for tensor in (*inputs, torch.zeros(2, 35, device=device))]
    arguments = (*leaves, table.tensors, table.numbers, 0.5)
    torch.library.opcheck(torch.ops.linearize.foveated_forward, arguments)
    output = foveated_attend(*leaves, table, 0.5)
    (first,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


def test_what_is_refused(qkv, exact_dtype):
    layout, shape = picture(4, 4, 3), (1, 2, 19, 8)
    assert foveated_refusal(FoveatedSpec(), shape) is None
    assert foveated_refusal(FoveatedSpec(order=1), shape).code == "order"
    split = HeadSplit((HeadGroup((0,), FoveatedSpec()), HeadGroup((1,), FoveatedSpec(top=0.3))))
    assert foveated_refusal(split, shape).code == "heads"
    assert foveated_refusal(HeadSplit((HeadGroup((0, 1), FoveatedSpec()),)), shape) is None
    query, key, value = qkv(layout, dtype=exact_dtype)
    with pytest.raises(ValueError, match="18 tokens where 3 text \\+ 16 main = 19"):
        foveated_with_triton(query, key[:, :, :-1], value, layout, FoveatedSpec())
    with pytest.raises(ValueError, match="have one shape, got"):
        foveated_with_triton(query, key[:, :1], value, layout, FoveatedSpec())


def test_through_the_front_door(qkv, exact_dtype, trusted):
    layout, spec = picture(7, 9, 5), FoveatedSpec(radius=1, top=0.3)
    inputs = qkv(layout, dtype=exact_dtype)
    outputs = [attention(*inputs, layout, spec, backend=backend) for backend in ("triton", "torch")]
    torch.testing.assert_close(*outputs, atol=5e-3, rtol=5e-3)
    with pytest.raises(ValueError, match="order 0"):
        attention(*inputs, layout, FoveatedSpec(order=1), backend="triton")
