"""Means of cells, and the tiles of keys that each head and tile of queries chooses by content."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..layout import Grid, TokenLayout
from ..specs import FoveatedSpec
from .clear import accumulator
from .foveated_cells import CellTable, chosen_tiles, mask_of, shape_of, tile_shape

CHUNK_SCORES = {"cpu": 2**18}  # scores of tiles, and squares of tokens, that are held at once
CHUNK_SCORES_GPU = 2**24
TINY = 1e-30
READ_ONCE = ("cuda",)


def choose_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: FoveatedSpec,
    table: CellTable,
    scale: float,
    means: Sequence[Tensor] = (),
) -> Tensor:
    """Return the tiles of keys that each tile of queries sees exactly for what they hold, besides those near to it.

    The best `top` of all tiles are those whose means would err most: by the deviation of the weights exp(q . k) in a
    tile, times that of its values. The scores q . k have mean m = mean(q) . mean(k) and, taken along the axes, variance
    v = sum_d mean(q)_d^2 var(k)_d, where a tile of several frames takes the square of each frame's mean. Were they
    normal, their exponents would deviate by exp(m + v) sqrt(1 - exp(-v)). With values of variance w, all axes together,
    a tile scores m + v + log(1 - exp(-v)) / 2 + log(w) / 2. Of equal scores the first in the sequence is taken.

    Shapes:
        query, key, value: (B, H, N, D). means: plain ones of the tiles' keys and values, (B, H, U, D) in fp32 or more,
        where they are known. Output: (B, H, U, K) int32, U tiles of all grids in order; -1 where no candidate was left.
    """
    count = chosen_tiles(spec, len(table.tiles))
    batch, heads = query.shape[:2]
    if not count:
        return torch.empty(batch, heads, len(table.tiles), 0, dtype=torch.int32, device=query.device)
    with torch.no_grad():
        sizes = (table.tiles >= 0).sum(1, keepdim=True)
        queries, squares = _frame_moments(query, layout, spec, scale)
        keys, values = means or (_tile_sums(tensor, layout, spec) / sizes for tensor in (key, value))
        variances = (_tile_squares(key, layout, spec, ()) / sizes - keys**2).clamp_min(0)
        lengths = _tile_squares(value, layout, spec, (-1,)) / sizes.squeeze(1)
        gains = (lengths - values.square().sum(-1)).clamp_min(TINY).log().unsqueeze(2) / 2  # (B, H, 1, U)
        asking = torch.cat([queries, squares, torch.ones_like(gains).transpose(2, 3)], -1)
        asked = torch.cat([keys, variances, gains.transpose(2, 3)], -1).transpose(-1, -2)
        rows = max(1, _most_scores(query) // max(1, batch * heads * len(table.tiles)))
        choice = torch.empty(batch, heads, len(table.tiles), count, dtype=torch.int32, device=query.device)
        for part, square, near, chosen in zip(
            asking.split(rows, 2), squares.split(rows, 2), table.near.split(rows), choice.split(rows, 2), strict=True
        ):
            deviation = (square.neg() @ variances.transpose(-1, -2)).expm1_().abs_().clamp_min_(TINY).log_()
            deviation.flatten(0, 1).baddbmm_(part.flatten(0, 1), asked.flatten(0, 1), beta=0.5)
            scores = deviation.masked_fill_(mask_of(near, deviation.shape[-1]), -math.inf)
            chosen.copy_(_best(scores, count))
        return choice


def _most_scores(tensor: Tensor) -> int:
    return CHUNK_SCORES.get(tensor.device.type, CHUNK_SCORES_GPU)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of each row in order, the first of equal ones; -1 for -inf."""
    least = scores.topk(count, -1).values[..., -1:]
    above = scores > least
    equal = (scores < least) == above  # a NaN too, which topk takes for the largest: it must not leave a row short
    room = count - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    ids = taken.nonzero()[:, -1].reshape(*scores.shape[:-1], count)
    return ids.masked_fill(scores.gather(-1, ids) == -math.inf, -1)


def means_of(
    tensor: Tensor, layout: TokenLayout, spec: FoveatedSpec, table: CellTable, pool_logits: Tensor | None = None
) -> Tensor:
    """Return the mean of each cell, levels one after another; differentiable.

    The tokens of a smallest cell count softmax(pool_logits) over the places that the cell has, in all frames alike. The
    mean of a larger cell is that of its parts, each counted by its tokens.

    Shapes:
        tensor: (B, H, N, D). pool_logits: (H, s, s), s the side of the smallest cells; None and equal ones make plain
        means. Output: (B, H, M, D) in fp32 or better.
    """
    sums: list[Tensor] = []
    current = list(_sums(tensor, layout, [shape_of(spec, 0, grid[0]) for _, grid in layout.grids], pool_logits))
    for level in range(spec.levels):
        if level:
            current = [_cell_sums(each, (1, 2, 2)) for each in current]
        sums += [each.flatten(2, 4) for each in current]
    if not sums:
        return tensor[:, :, :0].to(accumulator(tensor.dtype))
    return torch.cat(sums, 2) / table.sizes[:, None]


def mean_bias(table: CellTable, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of means: the log of their size, and what heads learned for their level.

    Shapes:
        bias: (H, levels), None for 0. Output: (H, M), or (1, M) where nothing was learned; differentiable.
    """
    log_sizes = table.sizes.to(dtype).log()[None]
    if bias is None:
        return log_sizes
    counts = [len(parents) for parents in table.parents]
    counts.append(len(table.sizes) - sum(counts))
    levels = zip(bias.to(table.sizes.device, dtype).unbind(1), counts, strict=True)
    return log_sizes + torch.cat([level[:, None].expand(-1, count) for level, count in levels], 1)


def _tile_sums(tensor: Tensor, layout: TokenLayout, spec: FoveatedSpec) -> Tensor:
    shapes = [tile_shape(spec, grid[0]) for _, grid in layout.grids]
    return torch.cat([each.flatten(2, 4) for each in _sums(tensor, layout, shapes)], 2)


def _tile_squares(tensor: Tensor, layout: TokenLayout, spec: FoveatedSpec, also: tuple[int, ...]) -> Tensor:
    """Return the sums of squares over tiles, and over the dimensions `also` of the values: (B, H, U, D) or (B, H, U).

    On a GPU a norm reads the numbers once and stores no squares; a CPU is faster with the squares of some rows.
    """
    found = []
    for start, grid in layout.grids:
        shape, tokens = tile_shape(spec, grid[0]), tensor[:, :, start : start + math.prod(grid)].unflatten(2, grid)
        exact = accumulator(tensor.dtype)
        if tensor.device.type in READ_ONCE:
            sums = torch.linalg.vector_norm(_boxes(tokens, shape), dim=(3, 5, 7, *also), dtype=exact).square()
        else:
            rows = shape[1] * max(1, _most_scores(tensor) // max(1, tokens.numel() // grid[1] * shape[1]))
            parts = [_boxes(part.to(exact).square(), shape).sum((3, 5, 7, *also)) for part in tokens.split(rows, 3)]
            sums = torch.cat(parts, 3)
        found.append(sums.flatten(2, 4))
    return torch.cat(found, 2)


def _frame_moments(tensor: Tensor, layout: TokenLayout, spec: FoveatedSpec, factor: float) -> tuple[Tensor, Tensor]:
    """Return of a tensor times `factor` the mean of each tile, and the mean over its frames of the squared mean of a
    frame, (B, H, U, D) each.
    """
    means, squares = [], []
    for start, grid in layout.grids:
        frames, rows, columns = tile_shape(spec, grid[0])
        tokens = tensor[:, :, start : start + math.prod(grid)].unflatten(2, grid)
        ones = torch.ones(1, 1, *grid, 1, dtype=accumulator(tensor.dtype), device=tensor.device)
        flat = _cell_sums(tokens, (1, rows, columns)) / _cell_sums(ones, (1, rows, columns)) * factor
        count = _cell_sums(ones[:, :, :, :1, :1], (frames, 1, 1))
        means.append((_cell_sums(flat, (frames, 1, 1)) / count).flatten(2, 4))
        squares.append((_cell_sums(flat.square(), (frames, 1, 1)) / count).flatten(2, 4))
    return torch.cat(means, 2), torch.cat(squares, 2)


def _sums(
    tensor: Tensor, layout: TokenLayout, shapes: list[Grid], pool_logits: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield for each grid the sums of its cells, (B, H, frames, rows, columns, D) of cells, in fp32 or better."""
    for (start, grid), shape in zip(layout.grids, shapes, strict=True):
        tokens = tensor[:, :, start : start + math.prod(grid)].unflatten(2, grid)
        if pool_logits is not None:
            logits = pool_logits.to(tensor.device, accumulator(tensor.dtype))
            tokens = tokens * pool_weights(logits, grid)[:, None, :, :, None]
        yield _cell_sums(tokens, shape)


def pool_weights(logits: Tensor, grid: Grid) -> Tensor:
    """Return how often each token of a frame counts in the sum of its cell, 1 on average over a cell.

    Shapes:
        logits: (H, s, s); equal ones give exactly 1. Output: (H, rows, columns).
    """
    heads, side, _ = logits.shape
    rows, columns = (-(-size // side) for size in grid[1:])
    places = logits.repeat(1, rows, columns)[:, : grid[1], : grid[2]]
    places = F.pad(places, (0, columns * side - grid[2], 0, rows * side - grid[1]), value=-math.inf)
    cells = rearrange(places, "h (r y) (c x) -> h r c (y x)", y=side, x=side)
    weights = (cells - cells.detach().amax(-1, keepdim=True)).exp()
    weights = weights * ((cells > -math.inf).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True))
    return rearrange(weights, "h r c (y x) -> h (r y) (c x)", y=side)[:, : grid[1], : grid[2]]


def _cell_sums(tokens: Tensor, shape: Grid) -> Tensor:
    """Return the sums over boxes: (B, H, frames, rows, columns, D) to the same of boxes."""
    return _boxes(tokens, shape).sum((3, 5, 7), dtype=accumulator(tokens.dtype))


def _boxes(tokens: Tensor, shape: Grid) -> Tensor:
    """Return (B, H, frames, rows, columns, D) as boxes (B, H, F, f, R, r, C, c, D), short ones filled with 0."""
    short = [-size % side for size, side in zip(tokens.shape[2:5], shape, strict=True)]
    if any(short):
        tokens = F.pad(tokens, (0, 0, 0, short[2], 0, short[1], 0, short[0]))
    return tokens.unflatten(4, (-1, shape[2])).unflatten(3, (-1, shape[1])).unflatten(2, (-1, shape[0]))
