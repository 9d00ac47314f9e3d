"""CLEAR's key lists as the tables of the Triton kernels: blocks of rows, lists of columns, packed bits.

`kinds/clear_table.py` knows which keys a tile of queries sees; this file lays that out as `kernels/clear_table.py`
describes. Visibility is symmetric, so one function makes both tables: queries as rows and keys as columns, or the
reverse.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from ...kernels import Table, Tile
from ...kernels.clear_table import ABSOLUTE, NUM_FIELDS
from ..kinds.clear_table import TILES, TileClass, covers_grid, tile_classes
from ..layout import Grid, Ranges, TokenLayout, token_indices

Disc = tuple[int, int]  # (radius, temporal radius)


def query_table(layout: TokenLayout, discs: Sequence[Disc], pooled: Ranges, tile: Tile, device: torch.device) -> Table:
    """Return the table whose rows are queries and whose columns are the keys that they see.

    Args:
        discs: one per head.
        pooled: (start, stop) of the pooled keys of each grid, behind the sequence; none without pooling.
        tile: of the kernel that reads it.
    """
    everything = token_indices(((0, layout.num_tokens),))
    shared = [(token_indices(layout.global_ranges), everything)]
    beside = [
        token_indices((*layout.global_ranges, *pooled[number : number + 1])) for number in range(len(layout.grids))
    ]
    return _table(layout, discs, shared, beside, tile, device)


def key_table(layout: TokenLayout, discs: Sequence[Disc], pooled: Ranges, tile: Tile, device: torch.device) -> Table:
    """Return the table whose rows are keys, pooled ones too, and whose columns are the queries that see them."""
    everything = token_indices(((0, layout.num_tokens),))
    shared = [(token_indices(layout.global_ranges), everything)]
    for span, (start, grid) in zip(pooled, layout.grids, strict=False):
        shared.append((token_indices((span,)), token_indices(((start, start + math.prod(grid)),))))
    beside = [token_indices(layout.global_ranges)] * len(layout.grids)
    return _table(layout, discs, shared, beside, tile, device)


def _table(
    layout: TokenLayout,
    discs: Sequence[Disc],
    shared: Sequence[tuple[Tensor, Tensor]],
    beside: Sequence[Tensor],
    tile: Tile,
    device: torch.device,
) -> Table:
    """Return a table.

    Args:
        shared: (rows, columns) that see each other under every head.
        beside: for each grid, the tokens that all its rows see besides those of the grid.
    """
    parts = _Parts(tile)
    blocks = [block for rows, columns in shared for block in parts.dense_blocks(rows, columns)]
    num_shared = len(blocks)
    tiles: dict[Disc, list[list[int]]] = {}
    for disc in sorted(set(discs)):
        found: list[list[int]] = []
        for (start, grid), others in zip(layout.grids, beside, strict=True):
            if covers_grid(grid, *disc):
                tokens = token_indices(((start, start + math.prod(grid)),))
                found += parts.dense_blocks(tokens, torch.cat([others, tokens]))
            else:
                for tile_class in grid_tiles(grid, disc, tile.rows):
                    found += parts.tile_blocks(tile_class, start, others)
        # neighbours in the picture run at the same time and find each other's keys in the cache
        tiles[disc] = sorted(found)
    num_tiles = max(map(len, tiles.values()), default=0)
    first: dict[Disc, int] = {}
    for disc, found in tiles.items():
        first[disc] = len(blocks)
        # heads of other radii may have more blocks; an empty one visits nothing
        blocks += found + [[0] * NUM_FIELDS] * (num_tiles - len(found))
    return Table(
        blocks=torch.tensor(blocks, dtype=torch.int32).reshape(-1, NUM_FIELDS).to(device),
        rows=parts.rows.joined().to(device),
        columns=parts.columns.joined(padding=tile.columns).to(device),
        masks=parts.masks.joined().to(device),
        heads=torch.tensor([first[disc] for disc in discs], dtype=torch.int32).to(device),
        num_shared=num_shared,
        num_tiles=num_tiles,
        tile=tile,
    )


def grid_tiles(grid: Grid, disc: Disc, rows: int) -> tuple[TileClass, ...]:
    """Return the tile classes of the tile shape that visits the fewest columns, counted in bounding boxes."""
    # a tile deeper than the grid would hold few rows
    shapes = [shape for shape in TILES[rows] if shape[0] <= grid[0]]
    choices = [tile_classes(grid, *disc, tile=shape) for shape in shapes]
    return min(choices, key=lambda classes: sum(each.num_tiles * _box(each) for each in classes))


def _box(tile_class: TileClass) -> int:
    return math.prod(axis.before + axis.extent + axis.after for axis in tile_class.axes)


@dataclass(slots=True)
class _Growing:
    """A one-dimensional int32 tensor in the making."""

    parts: list[Tensor] = field(default_factory=list)
    length: int = 0

    def add(self, values: Tensor) -> int:
        """Append and return where the values begin."""
        start = self.length
        self.parts.append(values.to(torch.int32).flatten())
        self.length += values.numel()
        return start

    def joined(self, padding: int = 1) -> Tensor:
        return torch.cat([*self.parts, torch.zeros(padding, dtype=torch.int32)])


class _Parts:
    """Rows, columns and masks of all blocks in the making. The fields of a block are those of `Table.blocks`."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.rows, self.columns, self.masks = _Growing(), _Growing(), _Growing()
        self._dense: dict[int, tuple[Tensor, int]] = {}

    def dense_blocks(self, rows: Tensor, columns: Tensor) -> Iterator[list[int]]:
        """Yield blocks of rows that see all of `columns`, both counted from the start of the sequence."""
        if not len(rows):
            return
        first_dense, num_dense, rest = self._dense_steps(columns)
        visible = torch.ones(self.tile.rows, len(rest), dtype=torch.bool)
        first_near, num_masked, first_mask = self._masked_steps(rest, visible)
        for part in rows.split(self.tile.rows):
            first_row = self._add_rows(part)
            yield [0, first_row, len(part), first_dense, num_dense, first_near, 0, num_masked, first_mask]

    def tile_blocks(self, tile_class: TileClass, start: int, beside: Tensor) -> Iterator[list[int]]:
        """Yield the blocks of a class of tiles on the grid that begins at token `start`."""
        lists = tile_class.lists()
        first_row = self._add_rows(lists.queries)
        first_dense, num_dense, rest = self._dense_steps(beside)
        num_full = lists.num_full // self.tile.columns
        open_keys = num_full * self.tile.columns
        first_near = self.columns.add(lists.keys[:open_keys])
        near = torch.cat([rest, lists.keys[open_keys:]])
        everywhere = torch.ones(len(lists.queries), len(rest), dtype=torch.bool)
        visible = torch.cat([everywhere, lists.visible[:, open_keys:]], dim=1)
        _, num_masked, first_mask = self._masked_steps(near, visible)
        for origin in (tile_class.origins() + start).tolist():
            yield [
                origin, first_row, len(lists.queries), first_dense, num_dense,
                first_near, num_full, num_masked, first_mask,
            ]  # fmt: skip

    def _add_rows(self, rows: Tensor) -> int:
        return self.rows.add(torch.cat([rows, rows[:1].expand(self.tile.rows - len(rows))]))

    def _dense_steps(self, columns: Tensor) -> tuple[int, int, Tensor]:
        """Return the start and number of whole steps of `columns`, stored once, and what is left for a masked one."""
        steps = len(columns) // self.tile.columns
        whole = steps * self.tile.columns
        if id(columns) not in self._dense:  # the tensor is kept, so that its id stays its own
            self._dense[id(columns)] = columns, self.columns.add(columns[:whole])
        return self._dense[id(columns)][1], steps, columns[whole:] + ABSOLUTE

    def _masked_steps(self, columns: Tensor, visible: Tensor) -> tuple[int, int, int]:
        """Return the start of columns, the number of steps and the start of masks; `visible` is (rows, columns)."""
        width, missing_rows = self.tile.columns, self.tile.rows - len(visible)
        steps = -(-len(columns) // width)
        padding = steps * width - len(columns)
        start = self.columns.add(torch.cat([columns, columns.new_zeros(padding)]))
        hidden = torch.nn.functional.pad(~visible, (0, padding, 0, missing_rows), value=True)
        return start, steps, self.masks.add(pack_bits(hidden, width))


def pack_bits(hidden: Tensor, width: int) -> Tensor:
    """Return (columns / width, width / 32, rows) int32 words; bit 31 - c % 32 of a word is hidden[row, c].

    Args:
        hidden: (rows, columns) bool; `width` divides the columns.
    """
    rows, columns = hidden.shape
    bits = hidden.reshape(rows, columns // 8, 8).to(torch.uint8)
    octets = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    octets = octets.reshape(rows, columns // 32, 4).to(torch.int32)
    words = (octets * torch.tensor([2**24, 2**16, 2**8, 1], dtype=torch.int32)).sum(-1, dtype=torch.int32)
    return rearrange(words, "row (step word) -> step word row", word=width // 32)
