"""Foveated attention in PyTorch: exact keys near a tile of queries and where content asks, means elsewhere.

For each tile of queries the exact keys are gathered, the means of all other cells stand beside them with the log of
their size as a bias, and one softmax does the rest, a bounded number of tiles at a time: memory grows linearly with the
number of tokens, forward and backward, and nothing is compiled per size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import TokenLayout
from ..memory import LongLived
from ..specs import FoveatedSpec
from .clear import accumulator
from .foveated_cells import CellTable, accepted_cells, cell_table, ids_of, mask_of
from .foveated_choice import choose_tiles, means_of

CHUNK_VALUES = {"cpu": 2**21}  # values of gathered keys and of scores that are held at once
CHUNK_VALUES_GPU = 2**26


def foveated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: FoveatedSpec,
    *,
    scale: float | None = None,
    choice: Tensor | None = None,
    memory: LongLived | None = None,
) -> Tensor:
    """Return foveated attention: every key counts once, itself or as a part of a mean.

    Shapes:
        query, key, value: (B, H, N, D), any strides, N = layout.num_tokens. Output: (B, H, N, D), contiguous.

    Args:
        layout: the tokens of the call. Global tokens see, and are seen by, everything exactly.
        spec: what is exact and which means stand for the rest.
        scale: factor on q . k; None is 1 / sqrt(D).
        choice: what `tiles_of` returned for this call or an earlier step; None chooses now.
        memory: keeps tables of cells between calls.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors.

    Notes:
        Gradients for query, key and value with the choice held fixed, once differentiable. Softmax and means are
        computed in fp32 (float64 for float64).
    """
    layout.check(query, key, value)
    layout = layout.with_all_grids
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    table = table_of(layout, spec, query.device, memory or LongLived())
    if choice is None:
        choice = choose_tiles(query, key, layout, spec, table, factor)
    means = [means_of(tensor, layout, spec, table) for tensor in (key, value)]
    shared = [
        torch.cat([tensor.index_select(2, table.globals), *([mean] if spec.levels == 1 else [])], 2)
        for tensor, mean in zip((key, value), means, strict=True)
    ]
    slope = _slope(key, means[0], value, table) * factor if spec.order else None
    inputs = _Inputs(query, key, value, shared[0], shared[1], means[0], means[1], slope)
    plan = _Plan(spec, table, choice, table.sizes.to(accumulator(query.dtype)).log(), factor)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Recompute.apply(*inputs, plan)  # type: ignore[no-any-return]
    return _forward(inputs, plan)


def tiles_of(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    spec: FoveatedSpec,
    *,
    scale: float | None = None,
    memory: LongLived | None = None,
) -> Tensor:
    """Return the tiles that content chooses, as `foveated_attention` takes them: (B, H, U, K) int64."""
    layout = layout.with_all_grids
    table = table_of(layout, spec, query.device, memory or LongLived())
    return choose_tiles(query, key, layout, spec, table, query.shape[-1] ** -0.5 if scale is None else scale)


def table_of(layout: TokenLayout, spec: FoveatedSpec, device: torch.device, memory: LongLived) -> CellTable:
    """Return the table of cells of a layout, kept in `memory`."""
    return memory.get(
        ("foveated", layout, spec, device), lambda: cell_table(layout, spec, device), lambda t: t.num_bytes
    )


class _Inputs(NamedTuple):
    """What gradients flow to: q, k, v, keys and values that all tiles share, means, and the first-order matrix."""

    query: Tensor
    key: Tensor
    value: Tensor
    shared_key: Tensor
    shared_value: Tensor
    mean_key: Tensor
    mean_value: Tensor
    slope: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    spec: FoveatedSpec
    table: CellTable
    choice: Tensor
    log_sizes: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """What some tiles of queries see; -1 fills lists that are short.

    Args:
        queries: (T, n) tokens.
        tokens: (b, h, T, K) exact tokens, b and h the batch and heads or 1.
        means: (b, h, T, L) means that are listed, None where all tiles share them.
        bias: (b, h, T, 1, S) added to the scores of shared keys.
    """

    queries: Tensor
    tokens: Tensor
    means: Tensor | None
    bias: Tensor


def _slope(key: Tensor, key_means: Tensor, value: Tensor, table: CellTable) -> Tensor:
    """Return the (B, H, D, D) mean over grid tokens of (k - mean of its smallest cell) v^T.

    Source: the global first-order term of PISA (arXiv 2602.01077).
    """
    cells, places = (table.cells >= 0).nonzero().unbind(1)
    tokens = table.cells[cells, places]
    exact = accumulator(key.dtype)
    spread = key.index_select(2, tokens).to(exact) - key_means.index_select(2, cells).to(exact)
    return spread.transpose(-1, -2) @ value.index_select(2, tokens).to(exact) / max(1, len(tokens))


def _forward(inputs: _Inputs, plan: _Plan) -> Tensor:
    query, key, value = inputs[:3]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = plan.table.globals
    if len(rows):
        found = F.scaled_dot_product_attention(query.index_select(2, rows), key, value, scale=plan.scale)
        output.index_copy_(2, rows, found)
    for chunk in _chunks(query, plan):
        real = chunk.queries >= 0
        output.index_copy_(
            2, chunk.queries[real], _attend(*_gather(inputs, chunk), chunk, plan)[:, :, real].to(query.dtype)
        )
    return output


def _chunks(query: Tensor, plan: _Plan) -> Iterator[_Chunk]:
    table, spec = plan.table, plan.spec
    copies, head_dim = query.shape[0] * query.shape[1], query.shape[-1]
    most_cells = table.exact.shape[1] + plan.choice.shape[-1]
    listed = most_cells * table.cells.shape[1] + (0 if table.means is None else table.means.shape[1])
    shared = len(table.globals) + (len(plan.log_sizes) if spec.levels == 1 else 0)
    per_tile = copies * (2 * listed * head_dim + table.tiles.shape[1] * (listed + shared))
    tiles = max(1, CHUNK_VALUES.get(query.device.type, CHUNK_VALUES_GPU) // max(1, per_tile))
    for first in range(0, len(table.tiles), tiles):
        yield _chunk(slice(first, first + tiles), plan)


def _chunk(rows: slice, plan: _Plan) -> _Chunk:
    table, spec = plan.table, plan.spec
    near, chosen, means = table.exact[None, None, rows], plan.choice[:, :, rows], None
    cells = near
    if spec.levels == 1 and chosen.shape[-1]:
        cells = torch.cat([near.expand(*chosen.shape[:3], -1), chosen], -1)
    elif spec.levels > 1 and not chosen.shape[-1]:
        assert table.means is not None
        means = table.means[None, None, rows]
    elif spec.levels > 1:
        cells, means = _lists_beside(chosen, rows, table)
    bias = plan.log_sizes.new_zeros(*cells.shape[:3], len(table.globals))
    if spec.levels == 1:
        is_exact = mask_of(cells, len(plan.log_sizes))
        bias = torch.cat([bias, plan.log_sizes.expand(is_exact.shape).masked_fill(is_exact, -torch.inf)], -1)
    tokens = F.pad(table.cells, (0, 0, 0, 1), value=-1)[cells].flatten(-2)
    return _Chunk(table.tiles[rows], tokens, means, bias.unsqueeze(-2))


def _lists_beside(chosen: Tensor, rows: slice, table: CellTable) -> tuple[Tensor, Tensor]:
    """Return exact cells and means where means of several levels stand beside chosen tiles: none holds a chosen one."""
    held = mask_of(chosen, len(table.tiles))
    fit = [table.far[0][rows] & ~held[..., table.parents[0]]]
    for level, far in enumerate(table.far[1:]):
        if level:  # the cells of level 1 are the tiles
            up = table.parents[level].expand(held.shape)
            held = torch.zeros(*held.shape[:3], far.shape[-1], device=held.device).scatter_add(-1, up, held.float()) > 0
        fit.append(far[rows] & ~held)
    return ids_of(~fit[0]), ids_of(torch.cat(accepted_cells(fit, table.parents), -1))


def _gather(inputs: _Inputs, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the queries (B, H, T, n, D), shared keys and values, own ones (B, H, T, K, D), and the slope."""
    query = inputs.query.index_select(2, chunk.queries.clamp_min(0).flatten()).unflatten(2, chunk.queries.shape)
    own = [
        torch.cat([_rows(tensor, chunk.tokens), *([] if chunk.means is None else [_rows(mean, chunk.means)])], 3)
        for tensor, mean in ((inputs.key, inputs.mean_key), (inputs.value, inputs.mean_value))
    ]
    return query, inputs.shared_key, inputs.shared_value, own[0], own[1], inputs.slope


def _rows(tensor: Tensor, ids: Tensor) -> Tensor:
    """Return tensor[b, h, ids[b, h]] for (B, H, N, D) and (B or 1, H or 1, T, K); -1 gives any row."""
    batch, heads, tokens, head_dim = tensor.shape
    ids = ids.clamp_min(0)
    if ids.shape[:2] == (1, 1):
        return tensor.index_select(2, ids.flatten()).reshape(batch, heads, *ids.shape[2:], head_dim)
    first = torch.arange(batch * heads, device=ids.device).reshape(batch, heads, 1, 1) * tokens
    flat = tensor.reshape(-1, head_dim).index_select(0, (first + ids).flatten())
    return flat.reshape(batch, heads, *ids.shape[2:], head_dim)


def _attend(
    query: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    slope: Tensor | None,
    chunk: _Chunk,
    plan: _Plan,
) -> Tensor:
    """Return (B, H, T, n, D) in fp32 or better."""
    exact = accumulator(query.dtype)
    query, shared_key, shared_value, own_key, own_value = (
        tensor.to(exact) for tensor in (query, shared_key, shared_value, own_key, own_value)
    )
    scaled = query * plan.scale
    shared = (scaled.flatten(2, 3) @ shared_key.transpose(-1, -2)).unflatten(2, scaled.shape[2:4]) + chunk.bias
    own = scaled @ own_key.transpose(-1, -2) + _own_bias(chunk, plan).unsqueeze(-2)
    weights = torch.cat([shared, own], -1).softmax(-1)
    shared, own = weights.split([shared.shape[-1], own.shape[-1]], -1)
    output = (shared.flatten(2, 3) @ shared_value).unflatten(2, scaled.shape[2:4]) + own @ own_value
    if slope is not None:
        means = shared[..., len(plan.table.globals) :], own[..., chunk.tokens.shape[-1] :]
        far = sum(part.sum(-1, keepdim=True) for part in means)
        output = output + far * (query.flatten(2, 3) @ slope).unflatten(2, scaled.shape[2:4])
    return output


def _own_bias(chunk: _Chunk, plan: _Plan) -> Tensor:
    """Return (b, h, T, K + L): the log of the size of each listed key, -inf for what only fills a list."""
    bias = torch.where(chunk.tokens < 0, -torch.inf, 0.0)
    if chunk.means is None:
        return bias
    sizes = plan.log_sizes[chunk.means.clamp_min(0)]
    sizes = sizes.masked_fill(chunk.means < 0, -torch.inf)
    return torch.cat([bias.expand(*sizes.shape[:3], -1), sizes], -1)


class _Recompute(torch.autograd.Function):
    """Forward without a graph; backward chunk by chunk, adding into one gradient per input."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:  # noqa: D102
        inputs, plan = _Inputs(*arguments[:-1]), arguments[-1]
        ctx.save_for_backward(*inputs)
        ctx.plan = plan
        return _forward(inputs, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: D102
        inputs, plan = _Inputs(*ctx.saved_tensors), ctx.plan
        totals = [
            None if t is None else torch.zeros(t.shape, dtype=accumulator(t.dtype), device=t.device) for t in inputs
        ]
        _add_globals(totals, inputs, plan, grad)
        for chunk in _chunks(inputs.query, plan):
            real = chunk.queries >= 0
            with torch.enable_grad():
                parts = [None if part is None else part.detach().requires_grad_() for part in _gather(inputs, chunk)]
                output = _attend(*parts, chunk, plan)[:, :, real]  # type: ignore[arg-type]
            leaves = [part for part in parts if part is not None]
            found = list(
                torch.autograd.grad(output, leaves, grad.index_select(2, chunk.queries[real]).to(output.dtype))
            )
            _add(totals, found, chunk, real)
        return *(None if s is None else s.to(t.dtype) for s, t in zip(totals, inputs, strict=True)), None  # type: ignore


def _add_globals(totals: list[Tensor | None], inputs: _Inputs, plan: _Plan, grad: Tensor) -> None:
    rows = plan.table.globals
    if not len(rows):
        return
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (inputs.query.index_select(2, rows), *inputs[1:3])]
        output = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], scale=plan.scale)
    found = torch.autograd.grad(output, leaves, grad.index_select(2, rows))
    for total, part, at in zip(totals[:3], found, (rows, None, None), strict=True):
        assert total is not None
        total += part if at is None else torch.zeros_like(total).index_copy_(2, at, part.to(total.dtype))


def _add(totals: list[Tensor | None], found: list[Tensor], chunk: _Chunk, real: Tensor) -> None:
    query, key, value, shared_key, shared_value, mean_key, mean_value, slope = totals
    assert query is not None
    query.index_add_(2, chunk.queries[real], found[0][:, :, real].to(query.dtype))
    for total, part in zip((shared_key, shared_value, slope), (found[1], found[2], *found[5:]), strict=False):
        if total is not None:
            total += part
    count = chunk.tokens.shape[-1]
    for tokens, means, part in ((key, mean_key, found[3]), (value, mean_value, found[4])):
        _add_rows(tokens, chunk.tokens, part[..., :count, :])
        if chunk.means is not None:
            _add_rows(means, chunk.means, part[..., count:, :])


def _add_rows(total: Tensor | None, ids: Tensor, part: Tensor) -> None:
    """Add (B, H, T, K, D) into total[b, h, ids[b, h]]; what -1 marks has no gradient."""
    assert total is not None
    batch, heads, tokens, head_dim = total.shape
    first = torch.arange(batch * heads, device=ids.device).reshape(batch, heads, 1, 1) * tokens
    flat = (first + ids.clamp_min(0)).flatten()
    total.view(-1, head_dim).index_add_(0, flat, part.reshape(-1, head_dim).to(total.dtype))
