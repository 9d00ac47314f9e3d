"""CLEAR attention in PyTorch: discs on grids, dense global tokens, optional pooled keys.

Runs wherever PyTorch runs. For each tile of queries the keys of its list are gathered next to the global (and pooled)
ones, and one scaled-dot-product call with a small mask does the rest, a bounded number of tiles at a time: memory grows
linearly with the number of tokens, forward and backward, and nothing is compiled per size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import Grid, TokenLayout, join_ranges, token_indices
from ..memory import LongLived
from ..specs import ClearSpec
from .clear_table import KeyLists, TileClass, covers_grid, tile_classes

# values of gathered keys held at once, found best on two CPU cores and generous enough for a GPU
CHUNK_VALUES = {"cpu": 2**20}
CHUNK_VALUES_GPU = 2**25
MIN_DENSE_QUERIES = 128  # of a chunk without a mask


def clear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: ClearSpec,
    *,
    scale: float | None = None,
    pool_weight: Tensor | None = None,
    memory: LongLived | None = None,
) -> Tensor:
    """Return CLEAR attention.

    Grid tokens see the global tokens, their disc and the pooled tokens of their grid; global tokens see everything but
    pooled tokens.

    Shapes:
        query, key, value: (B, H, N, D), any strides, N = layout.num_tokens. Output: (B, H, N, D), contiguous.

    Args:
        layout: the tokens of the call.
        spec: radius, temporal_radius, down_factor, proportional.
        scale: factor on q . k; None takes the spec's own.
        pool_weight: (d, d) weights of pooled tokens, d = spec.down_factor; None means 1 / d^2. A square cut by the
            border of the grid is scaled by d^2 / (cells present), a rule of ours: CLEAR requires divisible grids.
        memory: keeps key lists between calls; None builds them for this call.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors, or pool_weight another shape.

    Notes:
        Gradients for query, key, value and pool_weight, once differentiable; the backward pass recomputes each chunk.
        Softmax accumulates in fp32 as scaled_dot_product_attention does.

    Source: CLEAR (arXiv 2412.16112), section 3; github.com/Huage001/CLEAR.
    """
    layout.check(query, key, value)
    if scale is None:
        scale = spec.scale(query.shape[-1], layout.num_tokens)
    pooled: list[tuple[int, int]] = []
    if spec.down_factor > 1:
        key, value, pooled = append_pooled(key, value, layout, spec.down_factor, pool_weight)
    request = _Request(layout, spec, tuple(pooled), scale, memory or LongLived())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return _Recompute.apply(query, key, value, request)  # type: ignore[no-any-return]
    return _forward(query, key, value, request)


@dataclass(frozen=True, slots=True)
class _Request:
    """One call: `pooled` holds the (start, stop) of each grid's pooled keys, which follow the sequence."""

    layout: TokenLayout
    spec: ClearSpec
    pooled: tuple[tuple[int, int], ...]
    scale: float
    memory: LongLived


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries that are computed together: `tiles` tiles of equal shape.

    Args:
        queries: (tiles * Q,) token indices.
        keys: (tiles * K,) token indices, or a slice where they follow each other.
        bias: (Q, K) added to the scores, 0 where the query sees the key and -inf where not; None where all are seen.
    """

    tiles: int
    queries: Tensor
    keys: Tensor | slice
    bias: Tensor | None


def _forward(query: Tensor, key: Tensor, value: Tensor, request: _Request) -> Tensor:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for chunk in _chunks(query, request):
        q, k, v = _gather(query, key, value, chunk)
        output.index_copy_(2, chunk.queries, _attend(q, k, v, chunk, request.scale).to(output.dtype))
    return output


def _gather(query: Tensor, key: Tensor, value: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(chunk.keys, slice):
        return query.index_select(2, chunk.queries), key[:, :, chunk.keys], value[:, :, chunk.keys]
    return query.index_select(2, chunk.queries), key.index_select(2, chunk.keys), value.index_select(2, chunk.keys)


def _attend(query: Tensor, key: Tensor, value: Tensor, chunk: _Chunk, scale: float) -> Tensor:
    """Return (B, H, tiles * Q, D) from the gathered (B, H, tiles * Q, D) and (B, H, tiles * K, D)."""
    batch, size = query.shape[0] * query.shape[1] * chunk.tiles, query.shape[-1]
    q, k, v = (tensor.reshape(batch, 1, tensor.shape[2] // chunk.tiles, size) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=chunk.bias, scale=scale).reshape(query.shape)


class _Recompute(torch.autograd.Function):
    """Forward without a graph; backward chunk by chunk, adding into one gradient per input."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, request: _Request) -> Tensor:  # noqa: D102
        ctx.save_for_backward(query, key, value)
        ctx.request = request
        return _forward(query, key, value, request)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: D102
        query, key, value = inputs = ctx.saved_tensors
        request: _Request = ctx.request
        # keys are shared between chunks, so their gradients add up; fp32 keeps many small terms
        totals = [torch.zeros(t.shape, dtype=accumulator(t.dtype), device=t.device) for t in inputs]
        for chunk in _chunks(query, request):
            with torch.enable_grad():
                q, k, v = (part.detach().requires_grad_() for part in _gather(query, key, value, chunk))
                output = _attend(q, k, v, chunk, request.scale)
            found = torch.autograd.grad(output, (q, k, v), grad.index_select(2, chunk.queries))
            for total, part, index in zip(totals, found, (chunk.queries, chunk.keys, chunk.keys), strict=True):
                if isinstance(index, slice):
                    total[:, :, index] += part
                else:
                    total.index_add_(2, index, part.to(total.dtype))
        return *(total.to(t.dtype) for total, t in zip(totals, inputs, strict=True)), None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are added up: fp32 for narrower ones."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _chunks(query: Tensor, request: _Request) -> Iterator[_Chunk]:
    """Yield chunks that together hold every query once."""
    device, layout = query.device, request.layout
    head_dim, copies = query.shape[-1], query.shape[0] * query.shape[1]
    budget = CHUNK_VALUES.get(device.type, CHUNK_VALUES_GPU) // max(1, copies)
    if layout.num_global:
        global_queries = token_indices(layout.global_ranges, device)
        yield from _dense_chunks(global_queries, slice(0, layout.num_tokens), budget // head_dim)
    for number, (start, grid) in enumerate(layout.grids):
        shared_ranges = layout.global_ranges + request.pooled[number : number + 1]
        if covers_grid(grid, request.spec.radius, request.spec.temporal_radius):
            tokens = (start, start + math.prod(grid))
            seen = join_ranges((*shared_ranges, tokens))
            keys = slice(*seen[0]) if len(seen) == 1 else token_indices(seen, device)
            yield from _dense_chunks(token_indices((tokens,), device), keys, budget // head_dim)
            continue
        shared = token_indices(shared_ranges, device)
        for tile_class in tile_classes(grid, request.spec.radius, request.spec.temporal_radius):
            lists, origins = _lists_on(tile_class, device, request.memory)
            yield from _tile_chunks(lists, origins + start, shared, query.dtype, budget // head_dim)


def _dense_chunks(queries: Tensor, keys: Tensor | slice, max_queries: int) -> Iterator[_Chunk]:
    """Yield chunks of queries that see all of `keys`; the fused kernels of PyTorch need no budget for scores."""
    for part in queries.split(max(MIN_DENSE_QUERIES, max_queries)):
        yield _Chunk(1, part, keys, None)


def _tile_chunks(
    lists: KeyLists, origins: Tensor, shared: Tensor, dtype: torch.dtype, max_keys: int
) -> Iterator[_Chunk]:
    num_queries, num_listed = lists.visible.shape
    bias = None
    if lists.num_full < num_listed:
        bias = torch.zeros(num_queries, len(shared) + num_listed, dtype=dtype, device=origins.device)
        bias[:, len(shared) :].masked_fill_(~lists.visible, float("-inf"))
    for part in origins.split(max(1, max_keys // (len(shared) + num_listed))):
        queries = part[:, None] + lists.queries
        keys = torch.cat([shared.expand(len(part), -1), part[:, None] + lists.keys], dim=1)
        yield _Chunk(len(part), queries.flatten(), keys.flatten(), bias)


def _lists_on(tile_class: TileClass, device: torch.device, memory: LongLived) -> tuple[KeyLists, Tensor]:
    def make() -> tuple[KeyLists, Tensor]:
        lists = tile_class.lists()
        queries, keys, visible = (tensor.to(device) for tensor in (lists.queries, lists.keys, lists.visible))
        return KeyLists(queries, keys, visible, lists.num_full), tile_class.origins().to(device)

    return memory.get(("clear", tile_class, device), make, lambda made: made[0].num_bytes + 8 * len(made[1]))


def append_pooled(
    key: Tensor, value: Tensor, layout: TokenLayout, down_factor: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Return keys and values followed by the pooled ones of each grid, and where those lie."""
    keys, values, ranges, start = [key], [value], [], layout.num_tokens
    for first, grid in layout.grids:
        span = slice(first, first + math.prod(grid))
        keys.append(pool_tokens(key[:, :, span], grid, down_factor, weight))
        values.append(pool_tokens(value[:, :, span], grid, down_factor, weight))
        ranges.append((start, start + keys[-1].shape[2]))
        start = ranges[-1][1]
    return torch.cat(keys, 2), torch.cat(values, 2), ranges


def pool_tokens(tokens: Tensor, grid: Grid, down_factor: int, weight: Tensor | None = None) -> Tensor:
    """Return the pooled tokens of a grid, frame by frame: one weighted sum per d x d square.

    Shapes:
        tokens: (B, H, N, D) with N cells of `grid`. Output: (B, H, P, D), P = frames * ceil(height / d) *
        ceil(width / d).

    Args:
        weight: (d, d); None means 1 / d^2. Squares cut by the border are scaled by d^2 / (cells present).
    """
    batch, heads = tokens.shape[:2]
    frames, height, width = grid
    d = down_factor
    wide = accumulator(tokens.dtype)
    if weight is not None and tuple(weight.shape) != (d, d):
        raise ValueError(f"pooling weights are ({d}, {d}) for down_factor {d}, got {tuple(weight.shape)}")
    if weight is None:
        weight = torch.full((d, d), 1 / d**2, dtype=wide)
    planes = rearrange(tokens.to(wide), "b h (t y x) d -> (b h t) y x d", t=frames, y=height, x=width)
    planes = F.pad(planes, (0, 0, 0, -width % d, 0, -height % d))
    squares = rearrange(planes, "n (y i) (x j) d -> n y i x j d", i=d, j=d)
    pooled = torch.einsum("nyixjd,ij->nyxd", squares, weight.to(tokens.device, wide))
    present = [
        torch.tensor([min(d, size - first) / d for first in range(0, size, d)], dtype=wide, device=tokens.device)
        for size in (height, width)
    ]
    pooled = pooled / (present[0][:, None, None] * present[1][:, None])
    return rearrange(pooled, "(b h t) y x d -> b h (t y x) d", b=batch, h=heads, t=frames).to(tokens.dtype)
