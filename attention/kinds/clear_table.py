"""Packed key lists of CLEAR: for each tile of queries, the grid tokens its discs touch.

Queries are cut into small rectangular tiles. The keys of a tile are the grid cells that at least one of its queries
sees, listed without gaps: first the cells that *every* query of the tile sees, which need no mask, then the others.
Tiles that lie alike to the borders of the grid have the same list up to a shift, so there is one list per *tile class*.
Away from the borders there is one class: at radius 8 all the lists for 8192 x 8192 pixels hold 4,000 keys.

The table depends on the grid, the radius and the tile, not on text, heads, batch or dtype. It serves every step, every
site of equal radius, and any backend.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Grid

Tile = tuple[int, int, int]  # (frames, height, width) in tokens
# number of queries: the tiles that can hold them; in PyTorch NUM_QUERIES, in a kernel the rows of its block
TILES: dict[int, tuple[Tile, ...]] = {
    128: ((1, 8, 16), (1, 16, 8), (2, 8, 8), (4, 4, 8)),
    64: ((1, 8, 8), (2, 4, 8), (4, 4, 4)),
    32: ((1, 4, 8), (1, 8, 4), (2, 4, 4)),
    16: ((1, 4, 4), (2, 2, 4)),
}
NUM_QUERIES = 128


@dataclass(frozen=True, slots=True)
class KeyLists:
    """The keys of one tile class; offsets count tokens from the first query of a tile.

    Args:
        queries: (Q,) int64, offset of each query.
        keys: (K,) int64, offset of each key; the first `num_full` are seen by every query.
        visible: (Q, K) bool, which query sees which key.
        num_full: number of leading keys that need no mask.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor
    num_full: int

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.queries, self.keys, self.visible))


@dataclass(frozen=True, slots=True)
class AxisClass:
    """Tiles of one axis that lie alike: where they start, their extent, and how far keys reach before and after."""

    starts: tuple[int, ...]
    extent: int
    before: int
    after: int

    @property
    def num_pairs(self) -> int:
        return len(self.starts) * self.extent * (self.before + self.extent + self.after)


@dataclass(frozen=True, slots=True)
class TileClass:
    """The tiles of a grid that have the same keys up to a shift, one `AxisClass` per axis."""

    grid: Grid
    radius: int
    temporal_radius: int
    axes: tuple[AxisClass, AxisClass, AxisClass]

    @property
    def num_tiles(self) -> int:
        return len(self.axes[0].starts) * len(self.axes[1].starts) * len(self.axes[2].starts)

    def origins(self) -> Tensor:
        """Return (tiles,) int64, the token index in the grid of each tile's first query."""
        return self._offsets([torch.tensor(axis.starts) for axis in self.axes])

    def lists(self) -> KeyLists:
        """Return the key lists of these tiles, on the CPU."""
        queries = [torch.arange(axis.extent) for axis in self.axes]
        keys = [torch.arange(-axis.before, axis.extent + axis.after) for axis in self.axes]
        t, y, x = ((q[:, None] - k[None, :]).abs() for q, k in zip(queries, keys, strict=True))
        limits = torch.tensor([self._farthest(dt) for dt in range(int(t.max()) + 1)])
        total = y.square()[None, :, None, None, :, None] + x.square()[None, None, :, None, None, :]
        visible = total <= limits[t][:, None, None, :, None, None]
        visible = visible.reshape(t.shape[0] * y.shape[0] * x.shape[0], -1)
        full, touched = visible.all(dim=0), visible.any(dim=0)
        order = torch.cat([full.nonzero().flatten(), (touched & ~full).nonzero().flatten()])
        return KeyLists(self._offsets(queries), self._offsets(keys)[order], visible[:, order], int(full.sum()))

    def _farthest(self, dt: int) -> int:
        """Return the largest squared distance in a plane, dt frames away, that is seen; -1 where none is."""
        # whole numbers of any size: dt^2 r^2 + (dy^2 + dx^2) rt^2 < r^2 rt^2, with rt = 1 where every frame is seen
        squared = max(self.temporal_radius, 1) ** 2
        left = self.radius**2 * (squared - (dt**2 if self.temporal_radius else 0))
        return min((left - 1) // squared, self.grid[1] ** 2 + self.grid[2] ** 2) if left > 0 else -1

    def _offsets(self, coordinates: Sequence[Tensor]) -> Tensor:
        """Return the token offsets of every (t, y, x) combination, x fastest."""
        strides = (self.grid[1] * self.grid[2], self.grid[2], 1)
        t, y, x = (stride * axis.long() for stride, axis in zip(strides, coordinates, strict=True))
        return (t[:, None, None] + y[None, :, None] + x[None, None, :]).flatten()


@functools.lru_cache(maxsize=256)
def tile_classes(grid: Grid, radius: int, temporal_radius: int = 0, tile: Tile | None = None) -> tuple[TileClass, ...]:
    """Return the tile classes of `grid`; together their tiles hold every cell once.

    Args:
        grid: (frames, height, width) in tokens.
        radius, temporal_radius: as in `ClearSpec`.
        tile: (frames, height, width) of the query tiles; None takes the one of NUM_QUERIES that computes least.

    Source: the design of section "How packed key lists work" in CONTRIBUTING.md.
    """
    # a tile deeper than the grid would hold few queries
    candidates = [each for each in TILES[NUM_QUERIES] if each[0] <= grid[0]] if tile is None else [tile]
    reaches = (grid[0] - 1 if temporal_radius == 0 else temporal_radius - 1, radius - 1, radius - 1)
    choices = [
        tuple(_axis_classes(size, step, reach) for size, step, reach in zip(grid, candidate, reaches, strict=True))
        for candidate in candidates
    ]
    frames, rows, columns = min(choices, key=_computed_pairs)
    return tuple(TileClass(grid, radius, temporal_radius, axes) for axes in itertools.product(frames, rows, columns))


def _axis_classes(size: int, step: int, reach: int) -> tuple[AxisClass, ...]:
    starts_of: dict[tuple[int, int, int], list[int]] = {}
    for start in range(0, size, step):
        extent = min(step, size - start)
        key = (extent, min(start, reach), min(size - start - extent, reach))
        starts_of.setdefault(key, []).append(start)
    return tuple(AxisClass(tuple(starts), *key) for key, starts in starts_of.items())


def _computed_pairs(axes: tuple[tuple[AxisClass, ...], ...]) -> int:
    """Return the pairs in the bounding boxes of all tiles, a quick measure for choosing a tile."""
    frames, rows, columns = (sum(axis.num_pairs for axis in classes) for classes in axes)
    return frames * rows * columns


def covers_grid(grid: Grid, radius: int, temporal_radius: int = 0) -> bool:
    """Return whether every cell sees every cell, so that CLEAR is dense attention."""
    squared = max(temporal_radius, 1) ** 2
    farthest = ((grid[1] - 1) ** 2 + (grid[2] - 1) ** 2) * squared
    if temporal_radius:
        farthest += (grid[0] - 1) ** 2 * radius**2
    return farthest < radius**2 * squared
