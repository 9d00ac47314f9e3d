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
) -> Tensor:
    """Return foveated attention in float64 for an explicit choice of tiles.

    Shapes:
        query, key, value: (B, H, N, D). choice: (B, H, U, K), indices of tiles over all grids, -1 for none.
    """
    layout = layout.with_all_grids
    query, key, value = (tensor.double() for tensor in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    output = torch.zeros_like(query)
    loose = [token for start, stop in layout.global_ranges for token in range(start, stop)]
    output[:, :, loose] = torch.softmax(query[:, :, loose] @ key.transpose(-1, -2) * factor, -1) @ value
    tiles = boxes_of(layout, spec, spec.tile)
    for number, tile in enumerate(tiles):
        rows = tokens_of(tile)
        for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
            chosen = {token for each in choice[b, h, number].tolist() if each >= 0 for token in tokens_of(tiles[each])}
            exact, cells = what_a_tile_sees(tile, layout, spec, chosen)
            sets = [[token] for token in (*loose, *exact)] + cells
            keys, values = (torch.stack([t[b, h, members].mean(0) for members in sets]) for t in (key, value))
            sizes = torch.tensor([len(members) for members in sets], dtype=torch.float64)
            weights = torch.softmax(query[b, h, rows] @ keys.T * factor + sizes.log(), -1)
            output[b, h, rows] = weights @ values
            if spec.order and cells:
                far = weights[:, -len(cells) :].sum(-1, keepdim=True)
                slope = _slope(key[b, h], value[b, h], layout, spec)
                output[b, h, rows] += far * factor * (query[b, h, rows] @ slope)
    return output


def what_a_tile_sees(
    tile: Placed, layout: TokenLayout, spec: FoveatedSpec, chosen: set[int]
) -> tuple[list[int], list[list[int]]]:
    """Return the exact grid tokens of a tile of queries, and the sets of tokens whose means stand for the others.

    A cell stands as a mean where it is far enough and holds no chosen token; the largest are tried first.
    """
    covered: set[int] = set()
    cells: list[list[int]] = []
    smallest = spec.tile if spec.levels == 1 else spec.tile // 2
    for level in reversed(range(spec.levels)):
        for cell in boxes_of(layout, spec, smallest * 2**level):
            members = tokens_of(cell)
            if distance(tile, cell) >= spec.radius * 2**level and not {*members} & (covered | chosen):
                covered |= {*members}
                cells.append(members)
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


def _slope(key: Tensor, value: Tensor, layout: TokenLayout, spec: FoveatedSpec) -> Tensor:
    """Return the (D, D) mean over grid tokens of (k - mean of its smallest cell) v^T."""
    side = spec.tile if spec.levels == 1 else spec.tile // 2
    cells = [tokens_of(box) for box in boxes_of(layout, spec, side)]
    parts = [(key[cell] - key[cell].mean(0)).T @ value[cell] for cell in cells]
    return torch.stack(parts).sum(0) / sum(map(len, cells))
