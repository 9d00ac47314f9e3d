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
FOVEATED_KERNELS = ("foveated_forward", "foveated_dq", "foveated_dk_dv", "foveated_means")
Tiles = tuple[Tile, ...]  # one per name in KERNELS, in MAPPED_KERNELS, or in FOVEATED_KERNELS

LEAST = 32  # rows and columns of the smallest tile that a ladder leads to
SAFE: Tiles = (Tile(LEAST, LEAST, 4, 1),) * 5
_WIDE = (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2))
# two programs fit a processor of a card with 99 KB: one computes while the other waits for keys
_99_KB: dict[int, Tiles] = {
    64: (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    128: (Tile(128, 32, 4, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
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
    "sm90": {  # three stages: with two, keys are waited for at the head of every step
        64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        256: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "sm100": {
        64: _WIDE,
        128: _WIDE,
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "sm120": _99_KB,
    "cdna": {128: (Tile(64, 32, 4, 1),) * 3},
    "amd": {128: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))},
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
_MAPPED_HOPPER: dict[int, Tiles] = {
    64: (*_MAPPED_64[:3], Tile(128, 32, 8, 3), _STATE),
    128: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), _STATE),
    256: _MAPPED_228_KB[256],
}
# as TILES, of MAPPED_KERNELS
MAPPED_TILES: dict[str, dict[int, Tiles]] = {
    "sm80": {
        64: _MAPPED_64,
        128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), _STATE),
        256: (Tile(32, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), _STATE),
    },
    "sm86": _MAPPED_99_KB,
    "sm90": _MAPPED_HOPPER,
    "sm100": _MAPPED_228_KB,
    "sm120": _MAPPED_99_KB,
    "cdna": {128: (Tile(64, 32, 4, 1),) * 5},
    "amd": {128: (*(Tile(64, 32, 8, 1),) * 3, Tile(32, 32, 8, 1), Tile(64, 32, 8, 1))},
    "interpreted": {256: (Tile(16, 32, 4, 1),) * 5},
}
_FOVEATED_64: Tiles = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3))
_FOVEATED_128: Tiles = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3))
_FOVEATED_256: Tiles = (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2))
_FOVEATED_99_KB: dict[int, Tiles] = {
    64: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 64, 4, 3)),
    128: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3)),
    256: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
# as TILES, of FOVEATED_KERNELS; smaller tiles of queries, and smaller cells, have fewer rows than these
FOVEATED_TILES: dict[str, dict[int, Tiles]] = {
    "sm80": {
        64: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
        128: _FOVEATED_128,
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "sm86": _FOVEATED_99_KB,
    "sm90": {64: _FOVEATED_64, 128: _FOVEATED_128, 256: _FOVEATED_256},
    "sm100": {
        64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        128: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3)),
        256: (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "sm120": _FOVEATED_99_KB,
    "cdna": {128: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))},
    "amd": {128: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))},
    "interpreted": {256: (Tile(32, 64, 4, 1),) * 4},
}
_FAMILIES = ((KERNELS, TILES), (MAPPED_KERNELS, MAPPED_TILES), (FOVEATED_KERNELS, FOVEATED_TILES))
_rungs: dict[tuple[str, int, tuple[str, ...]], int] = {}  # how often a family's tiles were made smaller


def tile_for(kernel: str, architecture: str, head_size: int) -> Tile:
    """Return the tile of a kernel for heads of `head_size` values."""
    family, table = next(each for each in _FAMILIES if kernel in each[0])
    by_size = table.get(architecture, {})
    largest = min((size for size in by_size if size >= head_size), default=None)
    tile = (SAFE if largest is None else by_size[largest])[family.index(kernel)]
    for _ in range(_rungs.get((architecture, head_size, family), 0)):
        tile = smaller(tile)
    return tile


def smaller(tile: Tile) -> Tile:
    """Return the tile one rung down a ladder, which needs fewer resources; the lowest stays.

    Stages go first, since they cost shared memory and nothing but time; then columns, then rows.
    """
    if tile.num_stages > 1:
        return tile._replace(num_stages=tile.num_stages - 1)
    if tile.columns > LEAST:
        return tile._replace(columns=tile.columns // 2)
    if tile.rows > LEAST:
        return tile._replace(rows=tile.rows // 2, num_warps=min(4, tile.num_warps))
    return tile


def of_rows(tile: Tile, rows: int) -> Tile:
    """Return the tile of a program that owns at most `rows` tokens: no more rows than they need, few warps for few."""
    if rows >= tile.rows:
        return tile
    return Tile(max(16, 1 << (rows - 1).bit_length()), tile.columns, min(4, tile.num_warps), tile.num_stages)


def feature_stages(architecture: str, tile: Tile) -> int:
    """Return the stages of loops whose products take features from registers.

    One on Hopper: with more, Triton up to 3.6 overwrites registers that products under way still read (its issue 9433).
    """
    return 1 if architecture == "sm90" else tile.num_stages


def reduce_tiles(architecture: str, head_size: int, family: tuple[str, ...] = KERNELS) -> bool:
    """Take tiles of one rung less from now on, where they did not fit the device; return False if none is smaller."""
    before = [tile_for(kernel, architecture, head_size) for kernel in family]
    if [smaller(tile) for tile in before] == before:
        return False
    key = (architecture, head_size, family)
    _rungs[key] = _rungs.get(key, 0) + 1
    return True
