"""How CLEAR's kernels read their table: which block a program owns, which columns it visits, who sees whom.

Device functions only; the tables are described in `clear_table.py`.
"""

import triton
import triton.language as tl

from . import clear_table
from .tokens import NEVER

COUNTS = ["num_tokens", "num_heads", "num_copies", "num_shared", "num_tiles"]  # run-time numbers of all these kernels
FIELDS = tl.constexpr(clear_table.NUM_FIELDS)
ABSOLUTE = tl.constexpr(clear_table.ABSOLUTE)


@triton.jit
def locate(heads, num_shared, num_tiles, num_heads, num_copies):
    """Return batch, head and block of this program: shared blocks of all heads first, then tiles, tile fastest."""
    program = tl.program_id(0)
    is_shared = program < num_shared * num_copies
    program = tl.where(is_shared, program, program - num_shared * num_copies)
    per_copy = tl.where(is_shared, num_shared, num_tiles)
    copy = program // per_copy
    head = copy % num_heads
    block = program % per_copy + tl.where(is_shared, 0, tl.load(heads + head))
    return copy // num_heads, head, block


@triton.jit
def read_block(blocks, block):
    """Return a block: origin; first row, rows; first dense column, dense steps; first near column; open and masked
    steps, first mask. Open steps are those without a mask: the dense ones and those that every row sees.
    """
    entry = blocks + block * FIELDS
    origin, first_row, num_rows = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first_dense, num_dense, first_near = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    num_open, num_masked, first_mask = num_dense + tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8)
    return origin, first_row, num_rows, first_dense, num_dense, first_near, num_open, num_masked, first_mask


@triton.jit
def read_columns(columns, step, first_dense, num_dense, first_near, BLOCK: tl.constexpr):
    """Return the (BLOCK,) columns of a step: dense blocks first, then the tile's own list."""
    start = tl.where(step < num_dense, first_dense, first_near - num_dense * BLOCK) + step * BLOCK
    return tl.load(columns + start + tl.arange(0, BLOCK))


@triton.jit
def masked_tokens(columns, origin):
    """Return the tokens of masked columns; those that every row sees are not counted from the tile."""
    return tl.where(columns < ABSOLUTE, columns + origin, columns - ABSOLUTE)


@triton.jit
def hide(scores, masks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return `scores` (ROWS, COLUMNS) with NEVER where bit 31 - c % 32 of masks[c // 32, row] is set for column c."""
    row, group, bit = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS // 32)[None, :], tl.arange(0, 32)[None, None, :]
    words = tl.load(masks + group * ROWS + row)[:, :, None]
    # a bit becomes the sign, in two shifts: a thread's columns differ by eights, so the second is a constant
    signs = (words << (bit & 7)) << (bit & 24)
    return tl.where(tl.reshape(signs, [ROWS, COLUMNS]) < 0, NEVER, scores)
