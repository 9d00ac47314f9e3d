"""The float64 oracle of foveated attention: one tile of queries after another, cells as explicit sets of tokens.

Slow on purpose. It takes the choice of tiles as given and shares no code with what it judges.
"""

import itertools
import math

import torch
from torch import Tensor

from ..layout import Grid, TokenLayout
from ..specs import FoveatedSpec

Box = tuple[range, range, range]  # of frames, rows, columns
Placed = tuple[int, Grid, Box]  # the first token of its grid, the grid, the box


def foveated_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: FoveatedSpec,
    scale: float | None,
    choice: Tensor,
    bias: Tensor | None = None,
    pool_logits: Tensor | None = None,
) -> Tensor:
    """Return foveated attention in float64 for an explicit choice of tiles.

    Shapes:
        query, key, value: (B, H, N, D). choice: (B, H, U, K), indices of tiles over all grids, -1 for none.
        bias: (H, levels), added to the scores of means; None is 0.
        pool_logits: (H, s, s) of the weights of tokens in a smallest cell of side s; None makes plain means.
    """
    layout = layout.with_all_grids
    query, key, value = (tensor.double() for tensor in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    output = torch.zeros_like(query)
    loose = [token for start, stop in layout.global_ranges for token in range(start, stop)]
    output[:, :, loose] = torch.softmax(query[:, :, loose] @ key.transpose(-1, -2) * factor, -1) @ value
    tiles = boxes_of(layout, spec, spec.tile)
    counts = _counts(layout, spec, query.shape[1], pool_logits)
    for number, tile in enumerate(tiles):
        rows = tokens_of(tile)
        for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
            chosen = {token for each in choice[b, h, number].tolist() if each >= 0 for token in tokens_of(tiles[each])}
            exact, leveled = what_a_tile_sees(tile, layout, spec, chosen)
            cells = [members for _, members in leveled]
            sets = [[token] for token in (*loose, *exact)] + cells
            sizes = torch.tensor([len(members) for members in sets], dtype=torch.float64)
            keys, values = (
                torch.stack(
                    [t[b, h, token] for token in (*loose, *exact)]
                    + [(t[b, h, members] * counts[h, members, None]).sum(0) / len(members) for members in cells]
                )
                for t in (key, value)
            )
            scores = query[b, h, rows] @ keys.T * factor + sizes.log()
            if bias is not None and cells:
                added = torch.stack([bias[h, level].double() for level, _ in leveled])
                scores = torch.cat([scores[:, : -len(cells)], scores[:, -len(cells) :] + added], 1)
            weights = torch.softmax(scores, -1)
            output[b, h, rows] = weights @ values
            if spec.order and cells:
                far = weights[:, -len(cells) :].sum(-1, keepdim=True)
                slope = _slope(key[b, h], value[b, h], layout, spec, counts[h])
                output[b, h, rows] += far * factor * (query[b, h, rows] @ slope)
    return output


def what_a_tile_sees(
    tile: Placed, layout: TokenLayout, spec: FoveatedSpec, chosen: set[int]
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Return the exact grid tokens of a tile of queries, and the level and tokens of each mean that stands for others.

    A cell stands as a mean where it is far enough and holds no chosen token; the largest are tried first.
    """
    covered: set[int] = set()
    cells: list[tuple[int, list[int]]] = []
    smallest = spec.tile if spec.levels == 1 else spec.tile // 2
    for level in reversed(range(spec.levels)):
        for cell in boxes_of(layout, spec, smallest * 2**level):
            members = tokens_of(cell)
            if distance(tile, cell) >= spec.radius * 2**level and not {*members} & (covered | chosen):
                covered |= {*members}
                cells.append((level, members))
    everything = [token for start, grid in layout.grids for token in range(start, start + math.prod(grid))]
    return [token for token in everything if token not in covered], cells


def distance(tile: Placed, cell: Placed) -> float:
    """Return the distance of the nearest tokens of two boxes, infinite where their grids show different pictures."""
    (_, grid, own), (_, other, box) = tile, cell
    small, large = sorted((grid, other), key=lambda each: each[1] * each[2])
    if abs(large[1] * small[2] / large[2] - small[1]) > 1 or (grid[0] != other[0] and 1 not in (grid[0], other[0])):
        return math.inf
    total = 0.0
    for axis in range(3):
        if axis == 0 and grid[0] != other[0]:
            continue
        factor = other[axis] / grid[axis]
        first, last = own[axis][0] * factor, (own[axis][-1] + 1) * factor - 1
        total += max(box[axis][0] - last, first - box[axis][-1], 0.0) ** 2
    return math.sqrt(total)


def boxes_of(layout: TokenLayout, spec: FoveatedSpec, side: int) -> list[Placed]:
    """Return the boxes of `side` that cut the grids of a layout, in the order of their numbers."""
    found = []
    for start, grid in layout.grids:
        sides = (min(spec.frames or grid[0], grid[0]), side, side)
        axes = [
            [range(first, min(first + step, size)) for first in range(0, size, step)]
            for size, step in zip(grid, sides, strict=True)
        ]
        found += [(start, grid, box) for box in itertools.product(*axes)]
    return found


def tokens_of(placed: Placed) -> list[int]:
    """Return the tokens of a box, counted in the sequence."""
    start, grid, box = placed
    return [start + (t * grid[1] + y) * grid[2] + x for t, y, x in itertools.product(*box)]


def _counts(layout: TokenLayout, spec: FoveatedSpec, num_heads: int, pool_logits: Tensor | None) -> Tensor:
    """Return how often each token counts in the sum of its smallest cell, (H, N), the cell's size in all."""
    counts = torch.ones(num_heads, layout.num_tokens, dtype=torch.float64)
    if pool_logits is None:
        return counts
    side = spec.tile if spec.levels == 1 else spec.tile // 2
    for head, cell in itertools.product(range(num_heads), boxes_of(layout, spec, side)):
        _, _, (frames, rows, columns) = cell
        places = [(y - rows[0], x - columns[0]) for _, y, x in itertools.product(frames, rows, columns)]
        logits = torch.stack([pool_logits[head, y, x].double() for y, x in places])
        counts[head, tokens_of(cell)] = torch.softmax(logits, 0) * len(places)
    return counts


def _slope(key: Tensor, value: Tensor, layout: TokenLayout, spec: FoveatedSpec, counts: Tensor) -> Tensor:
    """Return the (D, D) mean over grid tokens of (k - mean of its smallest cell) v^T."""
    side = spec.tile if spec.levels == 1 else spec.tile // 2
    cells = [tokens_of(box) for box in boxes_of(layout, spec, side)]
    means = [(key[cell] * counts[cell, None]).sum(0) / len(cell) for cell in cells]
    parts = [(key[cell] - mean).T @ value[cell] for cell, mean in zip(cells, means, strict=True)]
    return torch.stack(parts).sum(0) / sum(map(len, cells))
