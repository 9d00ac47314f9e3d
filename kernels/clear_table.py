"""The tables of CLEAR's kernels: which rows see which columns. Imports no Triton.

`attention/gpu/clear_blocks.py` makes them, `clear_reader.py` reads them inside a kernel.
"""

from typing import NamedTuple

from torch import Tensor

from .tuning import Tile

NUM_FIELDS = 9  # numbers that describe a block
ABSOLUTE = 2**30  # from here on, a column of a masked step is counted from the start of the sequence


class Table(NamedTuple):
    """Which rows see which columns, for tiles of `tile.rows` rows and `tile.columns` columns.

    Shapes:
        blocks: (num_blocks, 9) int32, a row per block: origin; first_row, num_rows; first_dense, num_dense;
            first_near, num_full, num_masked; first_mask.
        rows: int32; row i of a block is token origin + rows[first_row + i], i < tile.rows; those from num_rows on
            repeat a real one and are not stored.
        columns: int32, read in steps of tile.columns: num_dense steps from first_dense, which are tokens; num_full
            steps from first_near, which are tokens less origin; num_masked steps after those, the same, where an
            entry of 2^30 or more is 2^30 plus a token. One step more than is used can be read.
        masks: int32, num_masked times (tile.columns / 32, tile.rows) words from first_mask on; bit 31 - c % 32 of word
            [c // 32, i] is set where row i does not see column c. Dense and full steps are seen by all rows.
        heads: (H,) int32, the first of a head's own blocks.

    Args:
        num_shared: blocks 0 to num_shared - 1 belong to every head. They come first in the launch, so the longest do.
        num_tiles: a head's own blocks.
        tile: how the kernel cuts the work.
    """

    blocks: Tensor
    rows: Tensor
    columns: Tensor
    masks: Tensor
    heads: Tensor
    num_shared: int
    num_tiles: int
    tile: Tile

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.blocks, self.rows, self.columns, self.masks, self.heads]

    @property
    def numbers(self) -> list[int]:
        return [self.num_shared, self.num_tiles, *self.tile]
