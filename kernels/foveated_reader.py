"""How foveated attention's kernels read their table: which rows a program owns, which columns it visits, step by step.

Device functions only; `foveated_table.py` describes the tables. A place is an index into the tokens of a table.
"""

import triton
import triton.language as tl

from . import foveated_table
from .tokens import NEVER

# run-time numbers of these kernels
COUNTS = ["num_tokens", "num_heads", "num_copies", "num_globals", "num_owners", "num_parts", "num_in_row",
          "num_in_column", "num_places", "num_means", "num_words", "num_tiles"]  # fmt: skip
FIELDS = tl.constexpr(foveated_table.NUM_FIELDS)


@triton.jit
def locate(num_shared, num_owned, num_copies):
    """Return copy, whether the block is one of global tokens, and block. Global blocks take longest and come first."""
    program = tl.program_id(0)
    is_shared = program < num_shared * num_copies
    program = tl.where(is_shared, program, program - num_shared * num_copies)
    per_copy = tl.where(is_shared, num_shared, num_owned)
    return program // per_copy, is_shared, program % per_copy


@triton.jit
def read_rows(tokens, is_shared, block, num_globals, num_parts, width, ROWS: tl.constexpr):
    """Return the (ROWS,) places of a block, whether they are its own, their tokens (-1 for none), and its owner."""
    owner = tl.where(is_shared, 0, block // num_parts)
    row = tl.where(is_shared, block, block % num_parts) * ROWS + tl.arange(0, ROWS)
    is_own = row < tl.where(is_shared, num_globals, width)
    places = row + tl.where(is_shared, 0, num_globals + owner * width)
    return places, is_own, tl.load(tokens + places, mask=is_own, other=-1), owner


@triton.jit
def read_list(fields, owner, is_shared):
    """Return the fields of an owner's list: its first id, their number and one more; none for global tokens."""
    entry, has_list = fields + owner * FIELDS, is_shared == 0
    first = tl.load(entry, mask=has_list, other=0)
    count = tl.load(entry + 1, mask=has_list, other=0).to(tl.int32)
    return first, count, tl.load(entry + 2, mask=has_list, other=0)


@triton.jit
def listed_places(slot, ids, count, num_globals, width):
    """Return the places of the members of listed sets of `width` members each, -1 beyond the last, and the sets."""
    entry = slot // width
    chosen = tl.load(ids + entry, mask=(slot >= 0) & (entry < count), other=-1)
    return tl.where(chosen >= 0, num_globals + chosen * width + slot - entry * width, -1), chosen


@triton.jit
def read_places(step, dense, num_dense, first_slot, ids, count, num_globals, width, COLUMNS: tl.constexpr):
    """Return the (COLUMNS,) places of a step, -1 for none: `dense` to `num_dense`, then those of sets from a slot."""
    slot, dense_steps = step * COLUMNS + tl.arange(0, COLUMNS), tl.cdiv(num_dense - dense, COLUMNS)
    own, _ = listed_places(slot - dense_steps * COLUMNS + first_slot, ids, count, num_globals, width)
    return tl.where(step < dense_steps, tl.where(dense + slot < num_dense, dense + slot, -1), own)


@triton.jit
def read_shift(slot, means, hidden, first_word, bias):
    """Return what is added to the scores of means in log2 units: their bias, or NEVER where they are not seen."""
    is_mean = means >= 0
    words = tl.load(hidden + first_word + (slot >> 5), mask=is_mean & (first_word >= 0), other=0)
    shift = tl.load(bias + means, mask=is_mean, other=NEVER)
    return tl.where(((words >> (slot & 31)) & 1) != 0, NEVER, shift)
