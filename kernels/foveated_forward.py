"""Foveated attention's forward kernel: softmax attention of a tile of queries over exact keys and means of others.

o = sum exp(s) v / sum exp(s) with s = scale q . k for a token and s = scale q . mean(k) + bias for a mean; an online
softmax in log2 units, fp32 throughout. A program owns a tile of queries, or a part, and visits its keys in three loops:
global keys and whole cells, without a mask; what is left of both; means. Global queries visit all tokens.
"""

import triton
import triton.language as tl

from .foveated_reader import COUNTS, locate, read_list, read_places, read_rows, read_shift
from .tokens import NEVER, absorb, load_tokens, store_tokens

BURIED = tl.constexpr(1.0e30)  # the lse of a place without a query: whatever its score is, its weight is 0


@triton.jit
def absorb_shifted(scores, scale, shift, v, top, total, acc):
    """Add keys to an online softmax: p = exp2(scale scores + shift - top), total = sum p, acc = sum p v."""
    scores = scores * scale + shift[None, :]
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=COUNTS)
def foveated_forward_kernel(
    q, k, v, mean_k, mean_v, bias, out, lse,
    query_tokens, key_tokens, cell_ids, cell_fields, mean_ids, mean_fields, hidden,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    mean_k_batch: tl.int64, mean_k_head: tl.int64, mean_k_token: tl.int64,
    mean_v_batch: tl.int64, mean_v_head: tl.int64, mean_v_token: tl.int64,
    scale, num_tokens, num_heads, num_copies, num_globals, num_owners, num_parts, num_in_row, num_in_column,
    num_places, num_means,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `out` (B, N, H, D), and `lse` (B, H, places of queries), of one block of queries."""
    copy, is_shared, block = locate(tl.cdiv(num_globals, BLOCK_ROWS), num_owners * num_parts, num_copies)
    batch, head = copy // num_heads, copy % num_heads
    places, is_own, rows, tile = read_rows(
        query_tokens, is_shared, block, num_globals, num_parts, num_in_row, BLOCK_ROWS
    )
    first_cell, num_cells, num_whole = read_list(cell_fields, copy * num_owners + tile, is_shared)
    cell_ids += first_cell
    is_real, queries, column = rows >= 0, tl.maximum(rows, 0), tl.arange(0, BLOCK_COLUMNS)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    q_rows = load_tokens(q + batch * q_batch + head * q_head, queries, q_token, SIZE, BLOCK_SIZE)

    top = tl.full([BLOCK_ROWS], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    # steps without a mask: of the global keys, and of whole cells
    num_open = tl.where(is_shared, 0, num_globals // BLOCK_COLUMNS * BLOCK_COLUMNS)
    first_slot = num_whole.to(tl.int32) * num_in_column // BLOCK_COLUMNS * BLOCK_COLUMNS
    # lists are read one step ahead, so that the loads of keys never wait for them
    place = read_places(0, 0, num_open, 0, cell_ids, num_cells, num_globals, num_in_column, BLOCK_COLUMNS)
    listed = tl.load(key_tokens + place, mask=place >= 0, other=0)
    for step in range((num_open + first_slot) // BLOCK_COLUMNS):
        keys = listed
        place = read_places(step + 1, 0, num_open, 0, cell_ids, num_cells, num_globals, num_in_column, BLOCK_COLUMNS)
        listed = tl.load(key_tokens + place, mask=place >= 0, other=0)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        top, total, acc = absorb(scores, scale, v_block, top, total, acc)

    num_dense = tl.where(is_shared, num_places, num_globals)
    num_steps = tl.cdiv(num_dense - num_open, BLOCK_COLUMNS)
    num_steps += tl.cdiv(num_cells * num_in_column - first_slot, BLOCK_COLUMNS)
    # for Hopper ptxas would put a wait behind every product of the kernel if this loop had stages
    for step in tl.range(0, num_steps, num_stages=1):
        place = read_places(
            step, num_open, num_dense, first_slot, cell_ids, num_cells, num_globals, num_in_column, BLOCK_COLUMNS
        )
        keys = tl.load(key_tokens + place, mask=place >= 0, other=-1)
        shift, keys = tl.where(keys >= 0, 0.0, NEVER), tl.maximum(keys, 0)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        top, total, acc = absorb_shifted(scores, scale, shift, v_block, top, total, acc)

    # read only now, since what lives through all loops takes registers
    first_mean, num_listed, first_word = read_list(mean_fields, copy * num_owners + tile, is_shared)
    mean_ids += first_mean
    mean_k += batch * mean_k_batch + head * mean_k_head
    mean_v += batch * mean_v_batch + head * mean_v_head
    for step in range(tl.cdiv(num_listed, BLOCK_COLUMNS)):
        slot = step * BLOCK_COLUMNS + column
        means = tl.load(mean_ids + slot, mask=slot < num_listed, other=-1)
        shift, keys = read_shift(slot, means, hidden, first_word, bias + head * num_means), tl.maximum(means, 0)
        k_block = load_tokens(mean_k, keys, mean_k_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        v_block = load_tokens(mean_v, keys, mean_v_token, SIZE, BLOCK_SIZE)
        top, total, acc = absorb_shifted(scores, scale, shift, v_block, top, total, acc)

    out += (batch.to(tl.int64) * num_tokens * num_heads + head) * SIZE
    store_tokens(out, queries, num_heads * SIZE, acc / total[:, None], is_real, SIZE, BLOCK_SIZE)
    lse += copy.to(tl.int64) * (num_globals + num_owners * num_in_row)
    tl.store(lse + places, tl.where(is_real, top + tl.log2(total), BURIED), mask=is_own)
