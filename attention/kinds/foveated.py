"""Foveated attention in PyTorch: exact keys near a tile of queries and where content asks, means elsewhere.

For each tile of queries the exact keys are gathered, the means of all other cells stand beside them with the log of
their size as a bias, and one softmax does the rest, a bounded number of tiles at a time: memory grows linearly with the
number of tokens, forward and backward, but for the choice, 4 bytes a chosen tile. Nothing is compiled per size.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import TokenLayout
from ..memory import LongLived
from ..specs import FoveatedSpec
from .clear import accumulator
from .foveated_cells import CellTable, cell_table
from .foveated_choice import choose_tiles, mean_bias, means_of
from .foveated_chunks import Chunk, Inputs, Plan, add_rows, chunk_of, gather, most_listed, own_bias, shared_bias

CHUNK_VALUES = {"cpu": 2**20}  # values of gathered keys and of scores that are held at once
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
    bias: Tensor | None = None,
    pool_logits: Tensor | None = None,
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
        bias: (H, levels) added to the scores of means by head and level, beside the log of their size; None is 0.
        pool_logits: (H, s, s) of the weights of tokens in the means of the smallest cells, of side s; see `means_of`.
        memory: keeps tables of cells between calls.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors, or what was learned has another shape.

    Notes:
        Gradients for query, key, value, bias and pool_logits with the choice held fixed, once differentiable.
        Softmax and means are computed in fp32 (float64 for float64). What content chooses is chosen by plain means.
    """
    layout.check(query, key, value)
    _check_learned(spec, query.shape[1], {"bias": bias, "pool_logits": pool_logits})
    layout = layout.with_all_grids
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    table = table_of(layout, spec, query.device, memory or LongLived())
    means = [means_of(tensor, layout, spec, table, pool_logits) for tensor in (key, value)]
    if choice is None:
        known = means if spec.levels == 1 and pool_logits is None else ()
        choice = choose_tiles(query, key, value, layout, spec, table, factor, known)
    means = [mean.to(tensor.dtype) for mean, tensor in zip(means, (key, value), strict=True)]
    shared = [
        torch.cat([tensor.index_select(2, table.globals), *([mean] if spec.levels == 1 else [])], 2)
        for tensor, mean in zip((key, value), means, strict=True)
    ]
    slope = _slope(key, means[0], value, table) * factor if spec.order else None
    biases = mean_bias(table, bias, accumulator(query.dtype))
    inputs = Inputs(query, key, value, shared[0], shared[1], means[0], means[1], biases, slope)
    plan = Plan(spec, table, choice, factor)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Recompute.apply(*inputs, plan)  # type: ignore[no-any-return]
    return _forward(inputs, plan)


def _check_learned(spec: FoveatedSpec, num_heads: int, learned: Mapping[str, Tensor | None]) -> None:
    shapes = spec.learned_shapes(num_heads)
    for name, tensor in learned.items():
        if tensor is not None and tuple(tensor.shape) != shapes.get(name):
            needed = f"has {shapes[name]}" if name in shapes else "has none"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this spec with {num_heads} heads {needed}")


def tiles_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: FoveatedSpec,
    *,
    scale: float | None = None,
    memory: LongLived | None = None,
) -> Tensor:
    """Return the tiles that content chooses, as `foveated_attention` takes them: (B, H, U, K) int32."""
    layout = layout.with_all_grids
    table = table_of(layout, spec, query.device, memory or LongLived())
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return choose_tiles(query, key, value, layout, spec, table, factor)


def table_of(layout: TokenLayout, spec: FoveatedSpec, device: torch.device, memory: LongLived) -> CellTable:
    """Return the table of cells of a layout, kept in `memory`."""

    def build() -> CellTable:
        with torch.inference_mode(False):  # or a later backward pass could not save its tensors
            return cell_table(layout, spec, device)

    return memory.get(("foveated", layout, spec, device), build, lambda t: t.num_bytes)


def _slope(key: Tensor, key_means: Tensor, value: Tensor, table: CellTable) -> Tensor:
    """Return the (B, H, D, D) mean over grid tokens of (k - mean of its smallest cell) v^T.

    Source: the global first-order term of PISA (arXiv 2602.01077).
    """
    cells, places = (table.cells >= 0).nonzero().unbind(1)
    tokens = table.cells[cells, places]
    exact = accumulator(key.dtype)
    spread = key.index_select(2, tokens).to(exact) - key_means.index_select(2, cells).to(exact)
    return spread.transpose(-1, -2) @ value.index_select(2, tokens).to(exact) / max(1, len(tokens))


def _forward(inputs: Inputs, plan: Plan) -> Tensor:
    query, key, value = inputs[:3]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = plan.table.globals
    if len(rows):
        found = F.scaled_dot_product_attention(query.index_select(2, rows), key, value, scale=plan.scale)
        output.index_copy_(2, rows, found)
    for chunk in _chunks(query, plan):
        real = chunk.queries >= 0
        output.index_copy_(
            2, chunk.queries[real], _attend(*gather(inputs, chunk), chunk, plan)[:, :, real].to(query.dtype)
        )
    return output


def _chunks(query: Tensor, plan: Plan) -> Iterator[Chunk]:
    table = plan.table
    copies, head_dim = query.shape[0] * query.shape[1], query.shape[-1]
    listed = most_listed(plan)
    shared = len(table.globals) + plan.num_shared
    per_tile = copies * (2 * listed * head_dim + table.tiles.shape[1] * (listed + shared))
    tiles = max(1, CHUNK_VALUES.get(query.device.type, CHUNK_VALUES_GPU) // max(1, per_tile))
    for first in range(0, len(table.tiles), tiles):
        yield chunk_of(slice(first, first + tiles), plan)


def _attend(
    query: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    bias: Tensor,
    slope: Tensor | None,
    chunk: Chunk,
    plan: Plan,
) -> Tensor:
    """Return (B, H, T, n, D) in fp32 or better."""
    exact = accumulator(query.dtype)
    query, shared_key, shared_value, own_key, own_value = (
        tensor.to(exact) for tensor in (query, shared_key, shared_value, own_key, own_value)
    )
    scaled = query * plan.scale
    shared = (scaled.flatten(2, 3) @ shared_key.transpose(-1, -2)).unflatten(2, scaled.shape[2:4])
    shared = shared + shared_bias(bias, chunk, len(plan.table.globals)).unsqueeze(-2)
    own = scaled @ own_key.transpose(-1, -2) + own_bias(bias, chunk).unsqueeze(-2)
    weights = torch.cat([shared, own], -1).softmax(-1)
    shared, own = weights.split([shared.shape[-1], own.shape[-1]], -1)
    output = (shared.flatten(2, 3) @ shared_value).unflatten(2, scaled.shape[2:4]) + own @ own_value
    if slope is not None:
        means = shared[..., len(plan.table.globals) :], own[..., chunk.tokens.shape[-1] :]
        far = sum(part.sum(-1, keepdim=True) for part in means)
        output = output + far * (query.flatten(2, 3) @ slope).unflatten(2, scaled.shape[2:4])
    return output


class _Recompute(torch.autograd.Function):
    """Forward without a graph; backward chunk by chunk, adding into one gradient per input that needs one."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:  # noqa: D102
        inputs, plan = Inputs(*arguments[:-1]), arguments[-1]
        ctx.save_for_backward(*inputs)
        ctx.plan = plan
        return _forward(inputs, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: D102
        inputs, plan = Inputs(*ctx.saved_tensors), ctx.plan
        totals = [
            torch.zeros(t.shape, dtype=accumulator(t.dtype), device=t.device) if t is not None and is_needed else None
            for t, is_needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        _add_globals(totals, inputs, plan, grad)
        for chunk in _chunks(inputs.query, plan):
            real = chunk.queries >= 0
            with torch.enable_grad():
                parts = [
                    None if part is None else part.detach().requires_grad_(is_needed)
                    for part, is_needed in zip(gather(inputs, chunk), _needed(totals, chunk), strict=True)
                ]
                output = _attend(*parts, chunk, plan)[:, :, real]  # type: ignore[arg-type]
            leaves = [part for part in parts if part is not None and part.requires_grad]
            grads = torch.autograd.grad(output, leaves, grad.index_select(2, chunk.queries[real]).to(output.dtype))
            rest = iter(grads)
            _add(totals, [next(rest) if part is not None and part.requires_grad else None for part in parts], chunk)
        return *(None if s is None else s.to(t.dtype) for s, t in zip(totals, inputs, strict=True)), None  # type: ignore


def _needed(totals: Sequence[Tensor | None], chunk: Chunk) -> list[bool]:
    """Return which of the tensors that `gather` returns need a gradient."""
    query, key, value, shared_key, shared_value, mean_key, mean_value, bias, slope = (t is not None for t in totals)
    has_means = chunk.means is not None
    own_key, own_value = key or (has_means and mean_key), value or (has_means and mean_value)
    return [query, shared_key, shared_value, own_key, own_value, bias, slope]


def _add_globals(totals: Sequence[Tensor | None], inputs: Inputs, plan: Plan, grad: Tensor) -> None:
    rows = plan.table.globals
    if not len(rows) or all(total is None for total in totals[:3]):
        return
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (inputs.query.index_select(2, rows), *inputs[1:3])]
        output = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], scale=plan.scale)
    found = torch.autograd.grad(output, leaves, grad.index_select(2, rows))
    for total, part, at in zip(totals[:3], found, (rows, None, None), strict=True):
        if total is not None:
            total += part if at is None else torch.zeros_like(total).index_copy_(2, at, part.to(total.dtype))


def _add(totals: Sequence[Tensor | None], grads: Sequence[Tensor | None], chunk: Chunk) -> None:
    """Add the gradients of what `gather` returned into those of the inputs."""
    query, key, value, shared_key, shared_value, mean_key, mean_value, bias, slope = totals
    of_query, of_shared_key, of_shared_value, of_own_key, of_own_value, of_bias, of_slope = grads
    real, count = chunk.queries >= 0, chunk.tokens.shape[-1]
    if query is not None and of_query is not None:
        query.index_add_(2, chunk.queries[real], of_query[:, :, real].to(query.dtype))
    whole = ((shared_key, of_shared_key), (shared_value, of_shared_value), (bias, of_bias), (slope, of_slope))
    for total, part in whole:
        if total is not None and part is not None:
            total += part
    for tokens, means, part in ((key, mean_key, of_own_key), (value, mean_value, of_own_value)):
        if tokens is not None and part is not None:
            add_rows(tokens, chunk.tokens, part[..., :count, :])
        if means is not None and part is not None and chunk.means is not None:
            add_rows(means, chunk.means, part[..., count:, :])
