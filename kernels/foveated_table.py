"""The table of foveated attention's kernels: which tile of queries sees which cells and means. Imports no Triton.

`attention/gpu/foveated.py` gives its lists, `foveated_reader.py` reads it inside a kernel. Backward kernels that own
keys need the lists turned around: for each cell, and for some means at a time, the tiles that see them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32  # bits of a word
MOST_MARKED = 2**26  # marks that are held at once
MOST_SORTED = 2**22  # listed cells that are sorted at once
NUM_FIELDS = 3  # of a list


class FoveatedTable(NamedTuple):
    """What tiles of queries see; -1 fills what is short. Z is 1 where all batches and heads see the same, else B H.

    Shapes:
        queries: (G + U n,) int32: the global tokens, which see and are seen by all, then those of each tile.
        keys: (G + C m,) int32: the global tokens, then those of each cell.
        cell_ids: (Z, U, K) int32, the cells that each tile sees exactly: whole ones, those with a gap, then -1.
        cell_counts: (Z, U, 2) int64: how many cells each tile sees, and how many of them are whole.
        mean_ids: (Z, U, L) int32, the means that each tile sees; or (1, 1, M), all, where `hidden` says which it sees.
        hidden: (Z, U, W) int32, W = ceil(M / 32); bit j % 32 of word j // 32 is set where a tile does not see mean j.
            (0,) where `mean_ids` lists what is seen.

    Args:
        num_globals, tile_size, cell_size: G, n, m.
    """

    queries: Tensor
    keys: Tensor
    cell_ids: Tensor
    cell_counts: Tensor
    mean_ids: Tensor
    hidden: Tensor
    num_globals: int
    tile_size: int
    cell_size: int

    @property
    def tensors(self) -> list[Tensor]:
        return [self.queries, self.keys, self.cell_ids, self.cell_counts, self.mean_ids, self.hidden]

    @property
    def numbers(self) -> list[int]:
        return [self.num_globals, self.tile_size, self.cell_size]

    @property
    def num_tiles(self) -> int:
        """U."""
        return (len(self.queries) - self.num_globals) // self.tile_size

    @property
    def num_cells(self) -> int:
        """C."""
        return (len(self.keys) - self.num_globals) // self.cell_size

    @property
    def lists_means(self) -> bool:
        """Whether each tile has its own list of means."""
        return self.hidden.ndim == 1


def foveated_table(
    shared: Tensor, tiles: Tensor, cells: Tensor, exact: Tensor, means: Tensor | None, num_means: int
) -> FoveatedTable:
    """Return the table for lists of cells and of means.

    Shapes:
        shared: (G,) global tokens. tiles: (U, n), cells: (C, m) tokens. exact: (Z, U, K) cells. means: (Z, U, L), or
        None for the means of all cells that a tile does not see exactly. All are whole numbers, -1 fills.
    """
    rank = F.pad(1 - (cells >= 0).all(1).to(torch.uint8), (0, 1), value=2)  # the last is for -1
    ids = torch.empty_like(exact, dtype=torch.int32)
    counts = torch.empty(*exact.shape[:2], 2, dtype=torch.int64, device=exact.device)
    rows = max(1, MOST_SORTED // max(1, exact.shape[0] * exact.shape[2]))
    for given, own, count in zip(exact.split(rows, 1), ids.split(rows, 1), counts.split(rows, 1), strict=True):
        order, places = rank[given.long()].sort(dim=2, stable=True)
        own.copy_(given.gather(2, places))
        count.copy_(torch.stack([(order < 2).sum(2), (order < 1).sum(2)], -1))
    everything = torch.arange(num_means, device=exact.device)[None, None]
    return FoveatedTable(
        queries=torch.cat([shared, tiles.flatten()]).to(torch.int32),
        keys=torch.cat([shared, cells.flatten()]).to(torch.int32),
        cell_ids=ids,
        cell_counts=counts,
        mean_ids=(everything if means is None else means).to(torch.int32).contiguous(),
        hidden=marks(exact, num_means, True) if means is None else torch.empty(0, dtype=torch.int32).to(exact.device),
        num_globals=len(shared),
        tile_size=tiles.shape[1],
        cell_size=cells.shape[1],
    )


class Lists(NamedTuple):
    """Lists in one tensor: int32 ids; (B H, R, 3) int64 fields of each owner: its first id, their number, and more."""

    ids: Tensor
    fields: Tensor


def cells_of(table: FoveatedTable, copies: int) -> Lists:
    """Return the list of cells of each tile; the last field is how many are whole."""
    return Lists(table.cell_ids, _fields(_starts(table.cell_ids), table.cell_counts, copies))


def means_of(table: FoveatedTable, copies: int) -> Lists:
    """Return the list of means of each tile; the last field is the first of its words, -1 where there are none."""
    lengths = (table.mean_ids >= 0).sum(2)
    if table.lists_means:
        rest = torch.stack([lengths, torch.full_like(lengths, -1)], -1)
        return Lists(table.mean_ids, _fields(_starts(table.mean_ids), rest, copies))
    words = _starts(table.hidden)
    rest = torch.stack([lengths.expand(words.shape), words], -1)
    return Lists(table.mean_ids, _fields(torch.zeros_like(words), rest, copies))


def _starts(rows: Tensor) -> Tensor:
    """Return where each row of (Z, R, K) begins, (Z, R)."""
    number, count, most = rows.shape
    return torch.arange(number * count, device=rows.device).view(number, count) * most


def _fields(first: Tensor, rest: Tensor, copies: int) -> Tensor:
    return torch.cat([first[..., None], rest], -1).expand(copies, -1, -1).contiguous()


def turned(ids: Tensor, count: int, copies: int) -> Lists:
    """Return for each of `count` columns the rows of (Z, R, K) lists that hold it, in order: a sort, no atomics."""
    number, rows, most = ids.shape
    row = torch.arange(rows, device=ids.device)[None, :, None]
    keys = torch.where(ids < 0, count * rows, ids.long() * rows + row).flatten(1).sort(1).values
    limits = torch.arange(count + 1, device=ids.device) * rows
    ends = torch.searchsorted(keys, limits.expand(number, -1).contiguous())
    first = ends[:, :-1] + torch.arange(number, device=ids.device)[:, None] * (rows * most)
    rest = torch.stack([ends.diff(dim=1), torch.zeros_like(first)], -1)
    return Lists((keys % max(1, rows)).to(torch.int32), _fields(first, rest, copies))


def blocks_of_means(table: FoveatedTable, num_means: int, rows: int, copies: int) -> tuple[Lists, Tensor, Tensor]:
    """Return for each block of `rows` means the tiles that see one of them; `hidden` for all, and its first words."""
    blocks, tiles, device = -(-num_means // rows), table.num_tiles, table.queries.device
    if table.lists_means:
        ids, hidden = table.mean_ids, marks(table.mean_ids, num_means, False)
        block = torch.where(ids < 0, -1, ids // rows).sort(2).values
        is_first = F.pad(block[..., 1:] != block[..., :-1], (1, 0), value=True)  # each block once
        lists = turned(torch.where(is_first, block, -1), blocks, copies)
    else:
        fields = torch.tensor([0, tiles, 0], device=device).expand(copies, blocks, 3).contiguous()
        lists, hidden = Lists(torch.arange(tiles, dtype=torch.int32, device=device), fields), table.hidden
    return lists, hidden, _starts(hidden).expand(copies, -1).contiguous()


def marks(ids: Tensor, count: int, is_listed: bool) -> Tensor:
    """Return (Z, U, W) int32 words whose bits say which of `count` columns (Z, U, K) lists hold, or do not hold."""
    if not count:
        return ids.new_empty((*ids.shape[:2], 0))
    width = -(-count // WORD) * WORD
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=ids.device)
    parts = []
    for part in ids.split(max(1, MOST_MARKED // max(1, ids.shape[0] * width)), 1):
        found = torch.full((*part.shape[:2], width + 1), not is_listed, device=ids.device)  # the last is for -1
        found.scatter_(2, torch.where(part < 0, width, part).long(), is_listed)
        octets = (found[..., :-1].unflatten(2, (-1, 8)) * weights).sum(3, dtype=torch.uint8)
        parts.append(octets.view(torch.int32))
    return torch.cat(parts, 1)
