"""Key lists: every pair once, nothing else, and little of it."""

import math

import pytest
import torch

from linearize.attention.kinds.clear_table import NUM_QUERIES, TILES, covers_grid, tile_classes
from linearize.attention.kinds.reference import clear_mask
from linearize.attention.layout import Segment, TokenLayout, grid_segment
from linearize.attention.planning.cost import disc_pairs
from linearize.attention.specs import ClearSpec

GRIDS = [(1, 1, 1), (1, 1, 37), (1, 23, 1), (1, 13, 29), (1, 17, 33), (3, 9, 11), (5, 4, 8)]


def seen_pairs(grid, radius, temporal_radius, tile=None):
    """Return the (N, N) matrix that the lists describe, as counts."""
    tokens = grid[0] * grid[1] * grid[2]
    counts = torch.zeros(tokens, tokens, dtype=torch.int64)
    for tile_class in tile_classes(grid, radius, temporal_radius, tile):
        lists = tile_class.lists()
        assert len(tile_class.origins()) == tile_class.num_tiles
        assert bool(lists.visible[:, : lists.num_full].all())
        assert not bool(lists.visible[:, lists.num_full :].all(dim=0).any()), "a full key stands among the masked ones"
        assert bool(lists.visible.any(dim=0).all()), "a listed key is seen by no query"
        for origin in tile_class.origins().tolist():
            rows, columns = torch.meshgrid(origin + lists.queries, origin + lists.keys, indexing="ij")
            counts.index_put_((rows, columns), lists.visible.long(), accumulate=True)
    return counts


@pytest.mark.parametrize(
    ("grid", "radius", "temporal"),
    [((1, 64, 64), 8, 0), ((1, 16, 40), 3, 0), ((1, 40, 16), 3, 0), ((8, 32, 32), 8, 3), ((16, 24, 24), 3, 8)],
)
def test_the_tile_that_computes_least_is_taken(grid, radius, temporal):
    def computed(tile=None):
        return sum(
            math.prod(axis.num_pairs for axis in each.axes) for each in tile_classes(grid, radius, temporal, tile)
        )

    assert computed() == min(computed(tile) for tile in TILES[NUM_QUERIES] if tile[0] <= grid[0])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("radius", "temporal"), [(1, 0), (3, 0), (4, 2), (6, 9), (50, 0), (50, 1), (7, 1024), (1024, 1024)]
)
def test_lists_hold_every_pair_once(grid, radius, temporal):
    layout = TokenLayout.of((grid_segment("main", *grid),))
    expected = clear_mask(layout, ClearSpec(radius, temporal))
    for tile in (None, *TILES[NUM_QUERIES], (2, 3, 5)):
        assert torch.equal(seen_pairs(grid, radius, temporal, tile), expected.long()), tile


@pytest.mark.parametrize(("side", "radius"), [(64, 8), (64, 16), (76, 8), (135, 8)])
def test_pair_count_is_the_closed_form(side, radius):
    """kernels of 1024 px and odd sizes: the same number as the sum over disc offsets."""
    grid = (1, side, side)
    total = sum(c.num_tiles * int(c.lists().visible.sum()) for c in tile_classes(grid, radius))
    assert total == disc_pairs(grid, radius)


def test_density_of_packed_lists():
    """At 4096 px and radius 8 packed 8 x 16 tiles hold 600 to 620 keys a tile, where the disc holds 193."""
    classes = tile_classes((1, 256, 256), 8)
    computed = sum(c.num_tiles * c.lists().visible.numel() for c in classes)
    assert 0.30 < disc_pairs((1, 256, 256), 8) / computed < 0.33


def test_tables_stay_small():
    """At 8192 px one list per border class is kept, not one per tile."""
    classes = tile_classes((1, 512, 512), 32)
    assert len(classes) <= 45
    assert sum(c.num_tiles for c in classes) == 2048
    assert sum(c.lists().num_bytes for c in classes) < 64 * 2**20


def test_covers_grid():
    assert covers_grid((1, 3, 4), 4) and not covers_grid((1, 4, 5), 5)
    assert covers_grid((7, 3, 4), 4) and covers_grid((2, 3, 4), 4, 9) and not covers_grid((3, 3, 4), 4, 3)
    for grid, radius, temporal in [((3, 3, 4), 4, 3), ((2, 3, 4), 4, 9), ((1, 4, 5), 6, 0), ((4, 2, 2), 2, 4)]:
        mask = clear_mask(
            TokenLayout.of((Segment("text", 0), grid_segment("main", *grid))), ClearSpec(radius, temporal)
        )
        assert covers_grid(grid, radius, temporal) == bool(mask.all())
