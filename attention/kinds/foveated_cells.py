"""Cells of foveated attention: how grids are cut, what is near, and which cells a tile of queries sees how.

Grids are cut into tiles, which share what they see, and into cells, whose means stand for what is far. Cells of the
next level are two by two of the one before. Nothing here depends on the values of queries and keys.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Grid, TokenLayout, token_indices
from ..specs import FoveatedSpec

CHUNK_PAIRS = 2**22  # distances that are held at once
MOST_PAIRS = 2**31  # of tiles and cells
MOST_KEPT = 2**29  # where all of them are kept


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Boxes that cut a grid, in row-major order; those at the far borders may be smaller.

    Args:
        counts: cells along (frames, rows, columns); C is their product.
        first, last: (C, 3) float64, the (frame, row, column) of a cell's first and last token.
        tokens: (C, n) int64, the tokens of each cell counted from the first of the grid; -1 fills short cells.
    """

    counts: Grid
    first: Tensor
    last: Tensor
    tokens: Tensor

    @property
    def sizes(self) -> Tensor:
        """(C,) int64, tokens of each cell."""
        return (self.tokens >= 0).sum(1)

    def parts(self, others: int) -> "Iterator[Cells]":
        """Yield some cells at a time, so few that their distances to `others` cells need little memory."""
        step = max(1, CHUNK_PAIRS // max(1, others))
        for first in range(0, len(self.first), step):
            rows = slice(first, first + step)
            yield Cells(self.counts, self.first[rows], self.last[rows], self.tokens[rows])


@functools.lru_cache(maxsize=256)
def cells_of(grid: Grid, shape: Grid) -> Cells:
    """Return the cells of `shape` (frames, rows, columns) that cut a grid."""
    starts = [torch.arange(0, size, side) for size, side in zip(grid, shape, strict=True)]
    counts = tuple(len(axis) for axis in starts)
    first = torch.cartesian_prod(*starts).reshape(-1, 3)
    limits = torch.tensor(grid)
    last = torch.minimum(first + torch.tensor(shape), limits) - 1
    inside = torch.cartesian_prod(*(torch.arange(side) for side in shape)).reshape(-1, 3)
    places = first[:, None] + inside
    index = (places[..., 0] * grid[1] + places[..., 1]) * grid[2] + places[..., 2]
    tokens = index.masked_fill((places >= limits).any(-1), -1)
    return Cells((counts[0], counts[1], counts[2]), first.double(), last.double(), tokens)


def shape_of(spec: FoveatedSpec, level: int, frames: int) -> Grid:
    """Return the shape of the cells of a level; level 0 has the smallest.

    One level has means of whole tiles. Several begin at half a tile's side, and each doubles the side.

    Args:
        frames: of the grid.
    """
    side = spec.cell_side * 2**level
    return min(spec.frames or frames, frames), side, side


def tile_shape(spec: FoveatedSpec, frames: int) -> Grid:
    """Return the shape of the tiles of a grid with `frames` frames."""
    return min(spec.frames or frames, frames), spec.tile, spec.tile


def are_aligned(one: Grid, other: Grid) -> bool:
    """Return whether two grids have the proportions of one picture, to within a token of the smaller one."""
    small, large = sorted((one, other), key=lambda grid: grid[1] * grid[2])
    frames_fit = one[0] == other[0] or 1 in (one[0], other[0])
    return frames_fit and abs(large[1] * small[2] / large[2] - small[1]) <= 1


def squared_distances(tiles: Cells, grid: Grid, cells: Cells, other: Grid) -> Tensor | None:
    """Return the squared distance of each tile of `grid` to each cell of `other`, in tokens of `other`.

    The distance of two boxes is that of their nearest tokens; a frame counts as one token. Grids of one proportion lie
    on each other, whatever their sizes. None means that the grids have nothing to do with each other.

    Args:
        tiles: some of those of `grid`.
        cells: all of those of `other`.

    Shapes:
        output: (U, C) float64.
    """
    if grid != other and not are_aligned(grid, other):
        return None
    total = torch.zeros(len(tiles.first), 1, 1, 1, dtype=torch.float64)
    for axis in range(3):
        if axis == 0 and grid[0] != other[0]:
            continue  # a picture beside a clip belongs to every frame
        factor = other[axis] / grid[axis]
        first, last = tiles.first[:, axis] * factor, (tiles.last[:, axis] + 1) * factor - 1
        starts, ends = (corner.unflatten(0, cells.counts).movedim(axis, 0)[:, 0, 0, axis] for corner in
                        (cells.first, cells.last))  # fmt: skip
        gaps = torch.maximum(starts - last[:, None], first[:, None] - ends).clamp_min(0) ** 2
        total = total + gaps.reshape(-1, *(len(starts) if each == axis else 1 for each in range(3)))
    return total.expand(-1, *cells.counts).flatten(1)


def is_far(spec: FoveatedSpec, level: int, tiles: Cells, grid: Grid, cells: Cells, other: Grid) -> Tensor:
    """Return (U, C) bool: which cells of a level are far enough from a tile for their mean to stand for them."""
    squared = squared_distances(tiles, grid, cells, other)
    if squared is None:
        return torch.ones(len(tiles.first), len(cells.first), dtype=torch.bool)
    return squared >= float(spec.radius * 2**level) ** 2


def chosen_tiles(spec: FoveatedSpec, num_tiles: int) -> int:
    """Return how many tiles of keys are chosen by content for each tile of queries: one at least where any are."""
    return min(num_tiles, max(int(spec.top > 0), math.floor(spec.top * num_tiles + 1e-6)))


@dataclass(frozen=True, slots=True, eq=False)
class CellTable:
    """The cells of one layout, all grids together, on one device; -1 fills lists that are short.

    Args:
        tiles: (U, n) int64, the tokens of each tile.
        cells: (C, m) int64, the tokens of each smallest cell; with one level these are the tiles.
        sizes: (M,) float32, tokens of the cells of all levels, smallest first.
        far: for each level (U, cells of it) bool: far enough for the mean. Empty where lists say all.
        near: (U, J) int64, tiles that are no candidates, since they are near.
        parents: for each level but the last, the cell of the next level that holds each cell.
        exact: (U, K) int64, smallest cells that are exact for their distance.
        means: (U, L) int64, means that each tile sees, where no content is asked and there are several levels.
        standing: (U,) int64, means that each tile sees before content is asked.
        globals: (G,) int64, the tokens without a place.
    """

    tiles: Tensor
    cells: Tensor
    sizes: Tensor
    far: tuple[Tensor, ...]
    near: Tensor
    parents: tuple[Tensor, ...]
    exact: Tensor
    means: Tensor | None
    standing: Tensor
    globals: Tensor

    @property
    def num_bytes(self) -> int:
        tensors = (
            self.tiles,
            self.cells,
            self.near,
            self.exact,
            *self.far,
            *(() if self.means is None else (self.means,)),
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cell_table(layout: TokenLayout, spec: FoveatedSpec, device: torch.device) -> CellTable:
    """Return the cells of a layout, all of whose places are grids.

    Raises:
        ValueError: the tiles are so small that the table would take long, or fill the memory.
    """
    places = layout.grids
    tiles = [cells_of(grid, tile_shape(spec, grid[0])) for _, grid in places]
    levels = [[cells_of(grid, shape_of(spec, level, grid[0])) for _, grid in places] for level in range(spec.levels)]
    parents = tuple(_parents(fine, coarse) for fine, coarse in zip(levels, levels[1:], strict=False))
    sizes = torch.cat([cells.sizes for level in levels for cells in level] or [torch.ones(0)])
    pairs, keeps_far = sum(len(each.first) for each in tiles) * len(sizes), spec.levels > 1 and spec.top > 0
    if pairs > (MOST_KEPT if keeps_far else MOST_PAIRS):
        raise ValueError(f"tile {spec.tile} cuts {layout.num_tokens} tokens into too many tiles; choose a larger one")
    rows = [_Rows.of(spec, part, grid, tiles, levels, places, parents)
            for own, (_, grid) in zip(tiles, places, strict=True) for part in own.parts(len(sizes))]  # fmt: skip
    table = CellTable(
        _tokens(tiles, places), _tokens(levels[0], places), sizes.float(),
        tuple(torch.cat(part) for part in zip(*(row.far for row in rows), strict=True)) if keeps_far else (),
        _joined([row.near for row in rows]), parents,
        _joined([row.exact for row in rows]),
        _joined([row.means for row in rows]) if spec.levels > 1 and not spec.top else None,
        torch.cat([row.standing for row in rows] or [torch.empty(0).long()]),
        token_indices(layout.global_ranges),
    )  # fmt: skip
    return CellTable(*(_on(getattr(table, name), device) for name in CellTable.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What some tiles see for their distance; see `CellTable`."""

    far: tuple[Tensor, ...]
    near: Tensor
    exact: Tensor
    means: Tensor
    standing: Tensor

    @classmethod
    def of(cls, spec: FoveatedSpec, part: Cells, grid: Grid, tiles: list[Cells], levels: list[list[Cells]],
           places: tuple[tuple[int, Grid], ...], parents: tuple[Tensor, ...]) -> "_Rows":  # fmt: skip
        """Return the rows of some tiles of a grid."""

        def far(level: int, cells: list[Cells]) -> Tensor:
            around = zip(cells, places, strict=True)
            return torch.cat([is_far(spec, level, part, grid, each, other) for each, (_, other) in around], 1)

        fit = tuple(far(level, cells) for level, cells in enumerate(levels))
        accepted = torch.cat(accepted_cells(fit, parents), 1)
        is_listed = spec.levels > 1 and not spec.top
        means = ids_of(accepted) if is_listed else torch.empty(len(accepted), 0, dtype=torch.int64)
        exact = ids_of(~fit[0])
        near = exact if spec.levels == 1 else ids_of(~far(0, tiles))
        kept = fit if spec.levels > 1 and spec.top else ()
        return cls(kept, near, exact, means, accepted.sum(1))


def accepted_cells(fit: Sequence[Tensor], parents: Sequence[Tensor]) -> list[Tensor]:
    """Return for each level which cells stand as means: those that may, and lie in no larger one that may.

    Shapes:
        fit: (..., cells of the level) bool each; the output has the same.
    """
    inside = [each & ~larger[..., up] for each, larger, up in zip(fit, fit[1:], parents, strict=False)]
    return [*inside, fit[-1]]


def ids_of(mask: Tensor) -> Tensor:
    """Return where each row of a mask is true, in order: (..., C) bool to (..., most of a row) int64, -1 behind."""
    flat = mask.reshape(-1, mask.shape[-1])
    counts = flat.sum(1)
    rows, columns = flat.nonzero(as_tuple=True)
    places = torch.arange(len(rows), device=mask.device) - (counts.cumsum(0) - counts)[rows]
    ids = torch.full((len(flat), int(counts.amax()) if len(flat) else 0), -1, device=mask.device)
    ids[rows, places] = columns
    return ids.unflatten(0, mask.shape[:-1]) if mask.ndim > 2 else ids


def mask_of(ids: Tensor, count: int) -> Tensor:
    """Return the mask that `ids_of` was given, whatever the order of its ids: (..., K) int64 to (..., count) bool."""
    mask = torch.zeros(*ids.shape[:-1], count + 1, dtype=torch.bool, device=ids.device)  # the last is for -1
    return mask.scatter_(-1, torch.where(ids < 0, count, ids), True)[..., :-1]


def _joined(parts: list[Tensor]) -> Tensor:
    """Return lists one below another, filled up to the longest with -1."""
    most = max((part.shape[1] for part in parts), default=0)
    filled = [F.pad(part, (0, most - part.shape[1]), value=-1) for part in parts]
    return torch.cat(filled) if filled else torch.empty(0, 0, dtype=torch.int64)


def _tokens(cells: list[Cells], places: tuple[tuple[int, Grid], ...]) -> Tensor:
    """Return the tokens of the cells of all grids, counted from the first of the sequence."""
    most = max((each.tokens.shape[1] for each in cells), default=1)
    parts = []
    for each, (start, _) in zip(cells, places, strict=True):
        tokens = torch.where(each.tokens < 0, -1, each.tokens + start)
        parts.append(F.pad(tokens, (0, most - tokens.shape[1]), value=-1))
    return torch.cat(parts) if parts else torch.empty(0, 1, dtype=torch.int64)


def _parents(fine: list[Cells], coarse: list[Cells]) -> Tensor:
    """Return which cell of twice the side holds each cell, over all grids."""
    parts, base = [], 0
    for small, large in zip(fine, coarse, strict=True):
        frame, row, column = torch.cartesian_prod(*(torch.arange(count) for count in small.counts)).reshape(-1, 3).T
        parts.append(base + (frame * large.counts[1] + row // 2) * large.counts[2] + column // 2)
        base += len(large.first)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(each.to(device) for each in value)
    return None if value is None else value.to(device)
