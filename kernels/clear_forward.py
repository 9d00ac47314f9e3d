"""CLEAR's forward kernel: softmax attention of a block of queries over its list of keys.

o = softmax(scale q k^T) v with an online softmax in log2 units, fp32 throughout. A program owns a block of queries and
visits its keys in two loops: those that every query of the block sees, then those that some see, by their bits.
"""

import triton
import triton.language as tl

from .clear_reader import COUNTS, hide, locate, masked_tokens, read_block, read_columns
from .tokens import absorb, load_tokens, store_tokens


@triton.jit(do_not_specialize=COUNTS)
def clear_forward_kernel(
    q, k, v, out, lse,
    blocks, rows, columns, masks, heads,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    scale, num_tokens, num_heads, num_copies, num_shared, num_tiles,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `out` (B, N, H, D) and `lse` (B, H, N) of one block of queries."""
    batch, head, block = locate(heads, num_shared, num_tiles, num_heads, num_copies)
    origin, first_row, num_rows, first_dense, num_dense, first_near, num_open, num_masked, first_mask = read_block(
        blocks, block
    )
    masks += first_mask
    if num_rows == 0:  # another head's radius makes more blocks
        return

    row = tl.arange(0, BLOCK_ROWS)
    queries = origin + tl.load(rows + first_row + row)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    q_rows = load_tokens(q + batch * q_batch + head * q_head, queries, q_token, SIZE, BLOCK_SIZE)

    top = tl.full([BLOCK_ROWS], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    # the list is read one step ahead, so that the loads of keys never wait for it
    listed = read_columns(columns, 0, first_dense, num_dense, first_near, BLOCK_COLUMNS)
    for step in range(num_open):
        keys = listed + tl.where(step < num_dense, 0, origin)
        listed = read_columns(columns, step + 1, first_dense, num_dense, first_near, BLOCK_COLUMNS)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        top, total, acc = absorb(scores, scale, v_block, top, total, acc)

    for step in range(num_open, num_open + num_masked):
        keys = masked_tokens(listed, origin)
        listed = read_columns(columns, step + 1, first_dense, num_dense, first_near, BLOCK_COLUMNS)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        scores = hide(scores, masks, BLOCK_ROWS, BLOCK_COLUMNS)
        masks += BLOCK_ROWS * (BLOCK_COLUMNS // 32)
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        top, total, acc = absorb(scores, scale, v_block, top, total, acc)

    is_real = row < num_rows
    out += (batch.to(tl.int64) * num_tokens * num_heads + head) * SIZE
    store_tokens(out, queries, num_heads * SIZE, acc / total[:, None], is_real, SIZE, BLOCK_SIZE)
    tl.store(lse + (batch * num_heads + head).to(tl.int64) * num_tokens + queries, top + tl.log2(total), mask=is_real)
