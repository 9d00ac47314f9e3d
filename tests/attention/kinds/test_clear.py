"""CLEAR in PyTorch against the float64 oracle: semantics, gradients, dtypes, strides, memory."""

import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Segment, TokenLayout, clear_attention, grid_segment, reference_attention
from linearize.attention.kinds import clear as clear_module
from linearize.attention.kinds.clear import pool_tokens
from linearize.attention.kinds.reference import clear_mask, pooling_matrix
from linearize.attention.memory import LongLived
from linearize.attention.specs import ClearSpec


def random_qkv(layout, heads=2, head_dim=16, batch=1, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shape = (batch, heads, layout.num_tokens, head_dim)
    return tuple(torch.randn(shape).to(dtype) for _ in range(3))


def flux(rows, columns, text):
    return TokenLayout.of((Segment("text", text), grid_segment("main", 1, rows, columns)))


ADVERSARIAL = {
    "one token": (flux(1, 1, 0), ClearSpec(1)),
    "one row": (flux(1, 61, 3), ClearSpec(4)),
    "one column": (flux(61, 1, 3), ClearSpec(4)),
    "primes": (flux(31, 37, 5), ClearSpec(7)),
    "self only": (flux(9, 17, 0), ClearSpec(1)),
    "no text": (flux(16, 33, 0), ClearSpec(5)),
    "one text token": (flux(16, 33, 1), ClearSpec(5)),
    "256 text tokens": (flux(12, 20, 256), ClearSpec(5)),
    "512 text tokens": (flux(12, 20, 512), ClearSpec(5)),
    "one more than a tile": (flux(9, 17, 2), ClearSpec(3)),
    "radius beyond the grid": (flux(13, 21, 4), ClearSpec(100)),
    "radius almost the grid": (flux(13, 21, 4), ClearSpec(19)),
    "text last": (TokenLayout.of((grid_segment("main", 1, 11, 19), Segment("text", 6))), ClearSpec(4)),
    "text in the middle": (
        TokenLayout.of((grid_segment("main", 1, 5, 19), Segment("text", 6), grid_segment("reference", 1, 7, 3))),
        ClearSpec(4),
    ),
    "reference as global": (
        TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 9, 14), Segment("reference", 35))),
        ClearSpec(4),
    ),
    "pooled": (flux(12, 20, 7), ClearSpec(3, down_factor=4)),
    "pooled ragged": (flux(13, 22, 7), ClearSpec(3, down_factor=4)),
    "pooled, two grids": (
        TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 9, 19), grid_segment("reference", 2, 7, 3))),
        ClearSpec(4, down_factor=4),
    ),
    "beyond two grids, between texts": (
        TokenLayout.of(
            (Segment("text", 3), grid_segment("main", 1, 5, 7), grid_segment("reference", 1, 3, 4), Segment("pad", 2))
        ),
        ClearSpec(30),
    ),
    "pooled beyond the grid": (flux(5, 6, 2), ClearSpec(30, down_factor=4)),
    "video, every frame": (TokenLayout.of((grid_segment("main", 3, 9, 11), Segment("text", 4))), ClearSpec(4)),
    "video, near frames": (TokenLayout.of((grid_segment("main", 5, 9, 11), Segment("text", 4))), ClearSpec(4, 2)),
    "video, pooled": (TokenLayout.of((grid_segment("main", 3, 9, 11),)), ClearSpec(4, 2, 3)),
    "proportional": (flux(12, 20, 7), ClearSpec(4, proportional=True)),
    "only text": (TokenLayout.of((Segment("text", 33),)), ClearSpec(4)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_forward_and_gradients_equal_the_oracle(name, relative_error, tolerance):
    layout, spec = ADVERSARIAL[name]
    inputs = [tensor.requires_grad_() for tensor in random_qkv(layout, batch=2)]
    output, truth = clear_attention(*inputs, layout, spec), reference_attention(*inputs, layout, spec)
    assert output.dtype == torch.float32 and output.is_contiguous()
    assert relative_error(output, truth) < tolerance[torch.float32]
    grad = torch.randn_like(output)
    for mine, true in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(truth, inputs, grad.double()), strict=True
    ):
        if true.norm() > 1e-8:  # with radius 1 and no text the softmax is constant
            assert relative_error(mine, true) < tolerance[torch.float32]
        else:
            assert mine.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["primes", "pooled ragged", "video, pooled"])
def test_gradcheck_in_double(name):
    layout, spec = {
        "primes": (flux(5, 3, 2), ClearSpec(2)),
        "pooled ragged": (flux(3, 5, 1), ClearSpec(2, down_factor=2)),
        "video, pooled": (TokenLayout.of((grid_segment("main", 2, 3, 2),)), ClearSpec(2, 1, 2)),
    }[name]
    inputs = [tensor.double().requires_grad_() for tensor in random_qkv(layout, 1, 4)]
    weight = torch.rand(spec.down_factor, spec.down_factor, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, w: clear_attention(q, k, v, layout, spec, pool_weight=w if spec.down_factor > 1 else None),
        (*inputs, weight if spec.down_factor > 1 else weight.detach()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1, 8])
def test_half_precision_is_as_good_as_sdpa(dtype, magnitude, relative_error):
    layout, spec = flux(16, 24, 64), ClearSpec(6)
    query, key, value = random_qkv(layout, 2, 64, dtype=dtype)
    query = query * magnitude
    output = clear_attention(query, key, value, layout, spec)
    assert output.dtype == dtype
    truth = reference_attention(query, key, value, layout, spec)
    baseline = F.scaled_dot_product_attention(query, key, value, attn_mask=clear_mask(layout, spec))
    assert relative_error(output, truth) < 1.5 * relative_error(baseline, truth)


def test_radius_beyond_the_grid_is_dense(relative_error):
    layout = flux(9, 14, 5)
    inputs = random_qkv(layout, dtype=torch.float64)
    dense = F.scaled_dot_product_attention(*inputs)
    assert relative_error(clear_attention(*inputs, layout, ClearSpec(17)), dense) < 1e-12
    assert relative_error(clear_attention(*inputs, layout, ClearSpec(8)), dense) > 1e-3


def test_global_queries_do_not_see_pooled_keys(relative_error):
    layout = flux(8, 8, 5)
    inputs = random_qkv(layout, dtype=torch.float64)
    plain, pooled = (clear_attention(*inputs, layout, ClearSpec(3, down_factor=d)) for d in (1, 4))
    assert relative_error(pooled[:, :, :5], plain[:, :, :5]) < 1e-12
    assert relative_error(pooled[:, :, 5:], plain[:, :, 5:]) > 1e-3


def test_views_of_a_fused_projection(relative_error, tolerance):
    """FLUX's single blocks pass q, k, v as views of one wide tensor."""
    layout, spec = flux(9, 13, 6), ClearSpec(4)
    heads, head_dim = 3, 8
    fused = torch.randn(2, layout.num_tokens, 3 * heads * head_dim + 40)
    parts = fused[..., : 3 * heads * head_dim].view(2, layout.num_tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    before = fused.clone()
    assert (
        relative_error(clear_attention(*parts, layout, spec), reference_attention(*parts, layout, spec))
        < (tolerance[torch.float32])
    )
    assert torch.equal(fused, before), "q, k or v was written into"


def test_scale_argument(relative_error):
    layout, spec = flux(7, 9, 2), ClearSpec(3)
    inputs = random_qkv(layout, dtype=torch.float64)
    for scale in (0.0, 0.01, 1.0):
        assert relative_error(
            clear_attention(*inputs, layout, spec, scale=scale), reference_attention(*inputs, layout, spec, scale=scale)
        ) < (1e-12)


@pytest.mark.parametrize("budget", [1, 4096, 10**9])
def test_chunks_do_not_change_the_result(budget, monkeypatch, relative_error):
    layout, spec = flux(33, 41, 9), ClearSpec(6)
    inputs = random_qkv(layout, dtype=torch.float64)
    monkeypatch.setitem(clear_module.CHUNK_VALUES, "cpu", budget)
    assert relative_error(clear_attention(*inputs, layout, spec), reference_attention(*inputs, layout, spec)) < 1e-12


def test_gathered_keys_fit_the_budget(monkeypatch):
    """Of one tile they may not; more tiles are taken while they do."""
    attend, held = clear_module._attend, []

    def watched(query, key, value, chunk, scale):
        held.append((chunk.tiles, key.numel()))
        return attend(query, key, value, chunk, scale)

    inputs = random_qkv(flux(33, 65, 9), 3, 8, 2)
    monkeypatch.setattr(clear_module, "_attend", watched)
    monkeypatch.setitem(clear_module.CHUNK_VALUES, "cpu", 50_000)
    clear_attention(*inputs, flux(33, 65, 9), ClearSpec(2))
    assert all(values <= 50_000 for tiles, values in held if tiles > 1)
    assert any(values > 25_000 for tiles, values in held if tiles > 1), "the budget is used"


WIDE = flux(9, 137, 23)  # text, and a class of seven tiles
IN_CHUNKS = {
    "text": (flux(9, 13, 23), ClearSpec(4), 1),
    "tiles": (flux(9, 137, 3), ClearSpec(4), 4),
    "tiles, pooled": (flux(9, 137, 3), ClearSpec(3, down_factor=4), 2),
    "covered grid": (flux(5, 7, 3), ClearSpec(50), 1),
    "covered grid, pooled": (flux(5, 7, 3), ClearSpec(50, down_factor=2), 1),
    "texts around a clip": (
        TokenLayout.of((Segment("text", 9), grid_segment("main", 3, 5, 9), Segment("pad", 12))), ClearSpec(3, 2), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_several_chunks_and_a_ragged_last_one(name, monkeypatch, relative_error):
    """Forward and backward in float64, 10 queries of text or of a covered grid at a time, and some tiles of others."""
    layout, spec, num_tiles = IN_CHUNKS[name]
    monkeypatch.setattr(clear_module, "MIN_DENSE_QUERIES", 10)
    tile_chunks, split = clear_module._tile_chunks, []

    def by_tiles(lists, origins, shared, dtype, max_keys):
        most = num_tiles * (len(shared) + len(lists.keys))
        found = list(tile_chunks(lists, origins, shared, dtype, most))
        split.append([chunk.tiles for chunk in found])
        return iter(found)

    dense_chunks = clear_module._dense_chunks

    def by_queries(queries, keys, max_queries):
        found = list(dense_chunks(queries, keys, 1))
        split.append([len(chunk.queries) for chunk in found])
        return iter(found)

    monkeypatch.setattr(clear_module, "_tile_chunks", by_tiles)
    monkeypatch.setattr(clear_module, "_dense_chunks", by_queries)
    inputs = [tensor.requires_grad_() for tensor in random_qkv(layout, 3, 8, 2, torch.float64)]
    grad = torch.randn_like(inputs[0])
    output, truth = clear_attention(*inputs, layout, spec), reference_attention(*inputs, layout, spec)
    assert any(len(sizes) > 2 and sizes[-1] < sizes[0] for sizes in split), split
    assert relative_error(output, truth) < 1e-12
    for mine, true in zip(*(torch.autograd.grad(each, inputs, grad) for each in (output, truth)), strict=True):
        assert relative_error(mine, true) < 1e-12


@pytest.mark.parametrize("grid", [(1, 8, 12), (1, 9, 13), (2, 5, 3), (1, 1, 1)])
def test_pooling_equals_its_matrix(grid):
    tokens = torch.randn(2, 3, grid[0] * grid[1] * grid[2], 5, dtype=torch.float64)
    weight = torch.randn(4, 4, dtype=torch.float64)
    expected = pooling_matrix(grid, 4, weight) @ tokens
    torch.testing.assert_close(pool_tokens(tokens, grid, 4, weight), expected)


def test_pooling_is_clears_where_clear_is_defined():
    """CLEAR reshapes to (H / d, d, W / d, d), multiplies by (1, d, 1, d) weights and sums; with 1 / d^2 it averages."""
    tokens = torch.randn(1, 2, 8 * 12, 5)
    planes = tokens.view(1, 2, 2, 4, 3, 4, 5)
    weight = torch.randn(4, 4)
    expected = (planes * weight.view(1, 1, 1, 4, 1, 4, 1)).sum(dim=(3, 5)).reshape(1, 2, 6, 5)
    torch.testing.assert_close(pool_tokens(tokens, (1, 8, 12), 4, weight), expected)
    torch.testing.assert_close(pool_tokens(tokens, (1, 8, 12), 4), planes.mean(dim=(3, 5)).reshape(1, 2, 6, 5))


def test_pooling_of_a_constant_is_that_constant_at_ragged_borders():
    tokens = torch.full((1, 1, 7 * 9, 3), 2.5)
    torch.testing.assert_close(pool_tokens(tokens, (1, 7, 9), 4), torch.full((1, 1, 6, 3), 2.5))


def test_kept_lists_are_reused_and_change_nothing():
    layout, spec, memory = flux(12, 20, 7), ClearSpec(4), LongLived()
    inputs = random_qkv(layout)
    first = clear_attention(*inputs, layout, spec, memory=memory)
    kept = dict(memory._values)
    assert kept
    assert torch.equal(clear_attention(*inputs, layout, spec, memory=memory), first)
    assert dict(memory._values) == kept


def test_wrong_number_of_tokens_is_refused():
    layout = flux(4, 4, 3)
    query = torch.randn(1, 1, 20, 8)
    with pytest.raises(ValueError, match="20 tokens where 3 text \\+ 16 main = 19"):
        clear_attention(query, query, query, layout, ClearSpec(2))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_linearly(backward):
    """Four times the tokens: the largest tensor grows at most so, and is far below N x N."""
    peaks = []
    for side in (48, 96):
        layout, spec = flux(side, side, 64), ClearSpec(5)
        inputs = [tensor.requires_grad_(backward) for tensor in random_qkv(layout, 1, 16)]
        with _LargestTensor() as largest:
            output = clear_attention(*inputs, layout, spec)
            if backward:
                output.sum().backward()
        peaks.append(largest.values)
    assert peaks[1] <= max(4.5 * peaks[0], clear_module.CHUNK_VALUES["cpu"])
    assert peaks[1] < 0.05 * (96 * 96 + 64) ** 2


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of values of the largest tensor that any operation returns."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_second_derivatives_are_refused_not_wrong():
    layout, spec = flux(4, 4, 2), ClearSpec(2)
    inputs = [tensor.requires_grad_() for tensor in random_qkv(layout)]
    (first,) = torch.autograd.grad(clear_attention(*inputs, layout, spec).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_autocast_runs_and_keeps_the_dtype_of_the_query():
    layout, spec = flux(9, 9, 4), ClearSpec(3)
    inputs = [tensor.requires_grad_() for tensor in random_qkv(layout)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = clear_attention(*inputs, layout, spec)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, reference_attention(*inputs, layout, spec).float(), atol=5e-2, rtol=5e-2)
    output.sum().backward()


@pytest.mark.parametrize("wrong", ["key", "value", "pool_weight"])
def test_shapes_that_do_not_belong_together_are_refused(wrong):
    layout, spec = flux(4, 4, 2), ClearSpec(2, down_factor=2)
    inputs = dict(zip(("query", "key", "value"), random_qkv(layout), strict=True))
    weight = torch.ones(1, 1) if wrong == "pool_weight" else None
    if wrong != "pool_weight":
        inputs[wrong] = torch.cat([inputs[wrong], inputs[wrong]], 2)
    with pytest.raises(ValueError, match="36 tokens" if weight is None else r"pooling weights are \(2, 2\)"):
        clear_attention(**inputs, layout=layout, spec=spec, pool_weight=weight)
