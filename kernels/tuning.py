"""How the kernels cut their work: one static table per architecture, and no search at run time.

A search would make first runs slow, and would give the same seed different pictures on different days. The entries
were chosen by compiling for each architecture: registers and shared memory suffice (tests/kernels/test_compile.py).
None has been timed yet.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program of a kernel works on.

    Args:
        rows: tokens that it owns.
        columns: tokens that it visits at a time, a multiple of 32.
        num_warps, num_stages: as Triton understands them.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


KERNELS = ("forward", "dq", "dk_dv")  # of CLEAR
MAPPED_KERNELS = ("mapped_forward", "mapped_dx", "mapped_dq", "mapped_dk_dv", "state")
Tiles = tuple[Tile, ...]  # one per name in KERNELS, or in MAPPED_KERNELS

SAFE: Tiles = (Tile(32, 32, 4, 1),) * 5
_WIDE = (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2))
_99_KB: dict[int, Tiles] = {
    64: _WIDE,
    128: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    256: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
}
# architecture: {largest head size: tiles of KERNELS}
TILES: dict[str, dict[int, Tiles]] = {
    "sm80": {
        64: _WIDE,
        128: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "sm86": _99_KB,
    "sm90": {
        64: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: _WIDE,
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "sm100": {
        64: _WIDE,
        128: _WIDE,
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "sm120": _99_KB,
    "amd": {128: (Tile(64, 32, 8, 1),) * 3},
    "interpreted": {256: (Tile(16, 32, 4, 1),) * 3},
}
_STATE = Tile(64, 64, 8, 2)
_MAPPED_64: Tiles = (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), _STATE)
_MAPPED_99_KB: dict[int, Tiles] = {
    64: _MAPPED_64,
    128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), _STATE),
    256: (Tile(32, 32, 8, 2), Tile(32, 64, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), _STATE),
}
_MAPPED_228_KB: dict[int, Tiles] = {
    64: _MAPPED_64,
    128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), _STATE),
    256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), _STATE),
}
# as TILES, of MAPPED_KERNELS
MAPPED_TILES: dict[str, dict[int, Tiles]] = {
    "sm80": {
        64: _MAPPED_64,
        128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), _STATE),
        256: (Tile(32, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), _STATE),
    },
    "sm86": _MAPPED_99_KB,
    "sm90": _MAPPED_228_KB,
    "sm100": _MAPPED_228_KB,
    "sm120": _MAPPED_99_KB,
    "amd": {128: (Tile(64, 32, 8, 1),) * 5},
    "interpreted": {256: (Tile(16, 32, 4, 1),) * 5},
}
_reduced: set[tuple[str, int, tuple[str, ...]]] = set()


def tile_for(kernel: str, architecture: str, head_size: int) -> Tile:
    """Return the tile of one of KERNELS or MAPPED_KERNELS for heads of `head_size` values."""
    family, table = (KERNELS, TILES) if kernel in KERNELS else (MAPPED_KERNELS, MAPPED_TILES)
    by_size = table.get(architecture, {})
    largest = min((size for size in by_size if size >= head_size), default=None)
    tiles = SAFE if largest is None or (architecture, head_size, family) in _reduced else by_size[largest]
    return tiles[family.index(kernel)]


def reduce_tiles(architecture: str, head_size: int, family: tuple[str, ...] = KERNELS) -> bool:
    """Take SAFE from now on, where a table's entry did not fit the device; return False if it was taken already."""
    if (architecture, head_size, family) in _reduced:
        return False
    _reduced.add((architecture, head_size, family))
    return True
