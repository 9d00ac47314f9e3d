"""Means of cells, and the tiles of keys that each head and tile of queries chooses by content."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Grid, TokenLayout
from ..specs import FoveatedSpec
from .clear import accumulator
from .foveated_cells import CellTable, chosen_tiles, mask_of, shape_of, tile_shape

CHUNK_SCORES = 2**24  # scores of tiles that are held at once


def choose_tiles(
    query: Tensor, key: Tensor, layout: TokenLayout, spec: FoveatedSpec, table: CellTable, scale: float
) -> Tensor:
    """Return the tiles of keys that each tile of queries sees exactly for what they hold, besides those near to it.

    A tile scores mean(q) . mean(k) plus the spread of mean(q) . k inside it, taken along the axes: the root of
    sum_d mean(q)_d^2 var(k)_d. The best `top` of all tiles are chosen; of equal scores the first in the sequence.

    Shapes:
        query, key: (B, H, N, D). Output: (B, H, U, K) int64, U tiles of all grids in order; -1 where no candidate was
        left.
    """
    count = chosen_tiles(spec, len(table.tiles))
    batch, heads = query.shape[:2]
    if not count:
        return torch.empty(batch, heads, len(table.tiles), 0, dtype=torch.int64, device=query.device)
    with torch.no_grad():
        sizes = (table.tiles >= 0).sum(1, keepdim=True)
        queries = _tile_sums(query, layout, spec) / sizes
        keys = _tile_sums(key, layout, spec) / sizes
        variances = (_tile_sums(key, layout, spec, squared=True) / sizes - keys**2).clamp_min(0)
        parts = []
        rows = max(1, CHUNK_SCORES // max(1, batch * heads * len(table.tiles)))
        for part, near in zip(queries.split(rows, 2), table.near.split(rows), strict=True):
            scores = part @ keys.transpose(-1, -2) * scale
            scores += ((part * scale) ** 2 @ variances.transpose(-1, -2)).sqrt()
            parts.append(_best(scores.masked_fill(mask_of(near, scores.shape[-1]), -math.inf), count))
        return torch.cat(parts, 2)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of each row in order, the first of equal ones; -1 for -inf."""
    least = scores.topk(count, -1).values[..., -1:]
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1) <= room))
    ids = taken.nonzero()[:, -1].reshape(*scores.shape[:-1], count)
    return ids.masked_fill(scores.gather(-1, ids) == -math.inf, -1)


def means_of(tensor: Tensor, layout: TokenLayout, spec: FoveatedSpec, table: CellTable) -> Tensor:
    """Return the mean of each cell, levels one after another: (B, H, N, D) to (B, H, M, D), differentiable."""
    sums: list[Tensor] = []
    current = list(_sums(tensor, layout, [shape_of(spec, 0, grid[0]) for _, grid in layout.grids]))
    for level in range(spec.levels):
        if level:
            current = [_cell_sums(each, (1, 2, 2)) for each in current]
        sums += [each.flatten(2, 4) for each in current]
    if not sums:
        return tensor[:, :, :0]
    return (torch.cat(sums, 2) / table.sizes[:, None]).to(tensor.dtype)


def _tile_sums(tensor: Tensor, layout: TokenLayout, spec: FoveatedSpec, squared: bool = False) -> Tensor:
    shapes = [tile_shape(spec, grid[0]) for _, grid in layout.grids]
    return torch.cat([each.flatten(2, 4) for each in _sums(tensor, layout, shapes, squared)], 2)


def _sums(tensor: Tensor, layout: TokenLayout, shapes: list[Grid], squared: bool = False) -> Iterator[Tensor]:
    """Yield for each grid the sums of its cells, (B, H, frames, rows, columns, D) of cells, in fp32 or better."""
    for (start, grid), shape in zip(layout.grids, shapes, strict=True):
        tokens = tensor[:, :, start : start + math.prod(grid)].unflatten(2, grid)
        yield _cell_sums(tokens.float() ** 2 if squared else tokens, shape)


def _cell_sums(tokens: Tensor, shape: Grid) -> Tensor:
    """Return the sums over boxes: (B, H, frames, rows, columns, D) to the same of boxes."""
    short = [-size % side for size, side in zip(tokens.shape[2:5], shape, strict=True)]
    if any(short):
        tokens = F.pad(tokens, (0, 0, 0, short[2], 0, short[1], 0, short[0]))
    boxes = tokens.unflatten(4, (-1, shape[2])).unflatten(3, (-1, shape[1])).unflatten(2, (-1, shape[0]))
    return boxes.sum((3, 5, 7), dtype=accumulator(tokens.dtype))
