"""The tables of the Triton kernels say exactly what the reference's mask says. No Triton is needed to read them."""

import itertools

import pytest
import torch

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.gpu.clear_blocks import key_table, pack_bits, query_table
from linearize.attention.kinds.clear_table import TILES
from linearize.attention.kinds.reference import clear_mask
from linearize.attention.specs import ClearSpec
from linearize.kernels import Tile
from linearize.kernels.clear_table import ABSOLUTE

CPU = torch.device("cpu")
TWO_GRIDS = (grid_segment("main", 1, 5, 19), Segment("text", 6), grid_segment("reference", 1, 7, 3))
LAYOUTS = {
    "picture": TokenLayout.of((Segment("text", 37), grid_segment("main", 1, 13, 22))),
    "no text": TokenLayout.of((grid_segment("main", 1, 9, 17),)),
    "one row": TokenLayout.of((Segment("text", 1), grid_segment("main", 1, 1, 61))),
    "two grids": TokenLayout.of(TWO_GRIDS),
    "text on both sides": TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 7, 9), Segment("pad", 5))),
    "video": TokenLayout.of((grid_segment("main", 5, 9, 11), Segment("text", 4))),
    "only text": TokenLayout.of((Segment("text", 33),)),
}
DISCS = ((1, 0), (4, 0), (4, 2), (7, 0), (100, 0))


def pairs_of(table, head, num_rows, num_columns):
    """Return how often each row meets each column under a head: (num_rows, num_columns)."""
    counts = torch.zeros(num_rows, num_columns, dtype=torch.int32, device=CPU)
    own = int(table.heads[head])
    width = table.tile.columns
    for number in itertools.chain(range(table.num_shared), range(own, own + table.num_tiles)):
        fields = table.blocks[number].tolist()
        origin, first_row, rows, first_dense, dense, first_near, full, masked, first_mask = fields
        tokens = origin + table.rows[first_row : first_row + table.tile.rows][:rows]
        counts[tokens[:, None], table.columns[first_dense : first_dense + dense * width][None]] += 1
        counts[tokens[:, None], origin + table.columns[first_near : first_near + full * width][None]] += 1
        first_masked = first_near + full * width
        for step in range(masked):
            columns = table.columns[first_masked + step * width :][:width]
            columns = torch.where(columns < ABSOLUTE, columns + origin, columns - ABSOLUTE)
            start = first_mask + step * table.tile.rows * (width // 32)
            words = table.masks[start : start + table.tile.rows * (width // 32)].reshape(-1, table.tile.rows)
            for position, column in enumerate(columns.tolist()):
                hidden = (words[position // 32] >> (31 - position % 32)) & 1
                counts[tokens, column] += 1 - hidden[:rows]
    return counts


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tile", [Tile(16, 32, 4, 1), Tile(128, 64, 4, 1)], ids=["16x32", "128x64"])
def test_every_visible_pair_is_met_once_and_no_other(name, tile):
    layout, tokens = LAYOUTS[name], LAYOUTS[name].num_tokens
    for table in (query_table(layout, DISCS, (), tile, CPU), key_table(layout, DISCS, (), tile, CPU)):
        for head, disc in enumerate(DISCS):
            found = pairs_of(table, head, tokens, tokens)
            assert torch.equal(found, clear_mask(layout, ClearSpec(*disc)).int().to(CPU)), disc


@pytest.mark.parametrize("name", ["picture", "two grids"])
def test_pooled_keys_belong_to_the_rows_of_their_grid(name):
    layout, tile = LAYOUTS[name], Tile(16, 32, 4, 1)
    tokens, start, pooled = layout.num_tokens, layout.num_tokens, []
    expected = torch.zeros(tokens, tokens + 45 * len(layout.grids), dtype=torch.int32, device=CPU)
    expected[:, :tokens] = clear_mask(layout, ClearSpec(3))
    for first, (_, height, width) in layout.grids:
        expected[first : first + height * width, start : start + 45] = 1
        pooled.append((start, start + 45))
        start += 45
    queries = query_table(layout, [(3, 0)], tuple(pooled), tile, CPU)
    keys = key_table(layout, [(3, 0)], tuple(pooled), tile, CPU)
    assert torch.equal(pairs_of(queries, 0, tokens, start), expected)
    assert torch.equal(pairs_of(keys, 0, start, tokens), expected.T)


@pytest.mark.parametrize("rows", TILES)
def test_every_shape_holds_the_rows_of_a_block(rows):
    assert {frames * height * width for frames, height, width in TILES[rows]} == {rows}


def test_bits_are_packed_from_the_highest():
    hidden = torch.zeros(3, 64, dtype=torch.bool)
    hidden[0, 0] = hidden[1, 31] = hidden[2, 33] = True
    words = pack_bits(hidden, 64)
    assert words.shape == (1, 2, 3)
    assert words[0].tolist() == [[-(2**31), 1, 0], [0, 0, 2**30]]


@pytest.mark.parametrize(("pixels", "radius", "keys"), [(1024, 8, 1056), (1024, 16, 1744), (4096, 16, 2059)])
def test_keys_per_query_are_those_of_the_design(pixels, radius, keys):
    """The counts of the survey of orderings: keys that a query of FLUX computes with, 512 text tokens included."""
    side = pixels // 16
    layout = TokenLayout.of((Segment("text", 512), grid_segment("main", 1, side, side)))
    table = query_table(layout, [(radius, 0)], (), Tile(128, 128, 8, 2), CPU)
    tiles = table.blocks[table.num_shared :]
    assert round(float((tiles[:, 4] + tiles[:, 6] + tiles[:, 7]).double().mean()) * 128) == keys
    assert table.num_bytes < 10**6


def test_neighbouring_tiles_follow_each_other():
    table = query_table(LAYOUTS["picture"], [(4, 0)], (), Tile(16, 32, 4, 1), CPU)
    origins = table.blocks[table.num_shared :, 0]
    assert torch.equal(origins, origins.sort().values)
