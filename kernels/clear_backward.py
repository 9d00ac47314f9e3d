"""CLEAR's backward kernels: one for the queries' gradient, one for those of keys and values. No atomics.

With p = exp2(scale q k^T - lse) and delta = rowsum(do o), summed over what each token sees:
dq = scale sum p (do v^T - delta) k,   dk = scale sum p (do v^T - delta) q,   dv = sum p do.
Each program owns its rows and visits blocks of columns in the order of the table, so results repeat bit for bit.
"""

import triton
import triton.language as tl

from .clear_reader import COUNTS, hide, locate, masked_tokens, read_block, read_columns
from .tokens import load_tokens, store_tokens

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_to_dq(scores, scale, lse, delta, do, k, v, dq):
    """Add what some keys give: ds = p (do v^T - delta), dq = sum ds k."""
    p = tl.exp2(scores * scale - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def add_to_dk_dv(scores, scale, lse, delta, q, do, v, dk, dv):
    """Add what some queries give; scores and all below are transposed, (keys, queries)."""
    p = tl.exp2(scores * scale - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def clear_dq_kernel(
    q, k, v, out, do, lse, delta, dq,
    blocks, rows, columns, masks, heads,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_tokens, num_heads, num_copies, num_shared, num_tiles,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dq` (B, N, H, D) and `delta` (B, H, N) of one block of queries."""
    batch, head, block = locate(heads, num_shared, num_tiles, num_heads, num_copies)
    origin, first_row, num_rows, first_dense, num_dense, first_near, num_open, num_masked, first_mask = read_block(
        blocks, block
    )
    masks += first_mask
    if num_rows == 0:  # another head's radius makes more blocks
        return

    row = tl.arange(0, BLOCK_ROWS)
    queries, is_real = origin + tl.load(rows + first_row + row), row < num_rows
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    owned = (batch.to(tl.int64) * num_tokens * num_heads + head) * SIZE
    q_rows = load_tokens(q + batch * q_batch + head * q_head, queries, q_token, SIZE, BLOCK_SIZE)
    do_rows = load_tokens(do + batch * do_batch + head * do_head, queries, do_token, SIZE, BLOCK_SIZE)
    out_rows = load_tokens(out + owned, queries, num_heads * SIZE, SIZE, BLOCK_SIZE)
    delta_rows = tl.sum(do_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    statistics = (batch * num_heads + head).to(tl.int64) * num_tokens + queries
    tl.store(delta + statistics, delta_rows, mask=is_real)
    lse_rows = tl.load(lse + statistics)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    listed = read_columns(columns, 0, first_dense, num_dense, first_near, BLOCK_COLUMNS)
    for step in range(num_open):
        keys = listed + tl.where(step < num_dense, 0, origin)
        listed = read_columns(columns, step + 1, first_dense, num_dense, first_near, BLOCK_COLUMNS)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        acc = add_to_dq(scores, scale, lse_rows, delta_rows, do_rows, k_block, v_block, acc)

    for step in range(num_open, num_open + num_masked):
        keys = masked_tokens(listed, origin)
        listed = read_columns(columns, step + 1, first_dense, num_dense, first_near, BLOCK_COLUMNS)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        scores = hide(scores, masks, BLOCK_ROWS, BLOCK_COLUMNS)
        masks += BLOCK_ROWS * (BLOCK_COLUMNS // 32)
        acc = add_to_dq(scores, scale, lse_rows, delta_rows, do_rows, k_block, v_block, acc)

    store_tokens(dq + owned, queries, num_heads * SIZE, acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)


@triton.jit(do_not_specialize=[*COUNTS, "num_keys"])
def clear_dk_dv_kernel(
    q, k, v, do, lse, delta, dk, dv,
    blocks, rows, columns, masks, heads,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_tokens, num_keys, num_heads, num_copies, num_shared, num_tiles,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dk` and `dv` (B, N + P, H, D) of one block of keys: rows are keys, columns the queries that see them."""
    batch, head, block = locate(heads, num_shared, num_tiles, num_heads, num_copies)
    origin, first_row, num_rows, first_dense, num_dense, first_near, num_open, num_masked, first_mask = read_block(
        blocks, block
    )
    masks += first_mask
    if num_rows == 0:  # another head's radius makes more blocks
        return

    row = tl.arange(0, BLOCK_ROWS)
    keys, is_real = origin + tl.load(rows + first_row + row), row < num_rows
    q += batch * q_batch + head * q_head
    do += batch * do_batch + head * do_head
    lse += (batch * num_heads + head).to(tl.int64) * num_tokens
    delta += (batch * num_heads + head).to(tl.int64) * num_tokens
    k_rows = load_tokens(k + batch * k_batch + head * k_head, keys, k_token, SIZE, BLOCK_SIZE)
    v_rows = load_tokens(v + batch * v_batch + head * v_head, keys, v_token, SIZE, BLOCK_SIZE)

    dk_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    dv_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    listed = read_columns(columns, 0, first_dense, num_dense, first_near, BLOCK_COLUMNS)
    for step in range(num_open):
        queries = listed + tl.where(step < num_dense, 0, origin)
        listed = read_columns(columns, step + 1, first_dense, num_dense, first_near, BLOCK_COLUMNS)
        q_block = load_tokens(q, queries, q_token, SIZE, BLOCK_SIZE)
        do_block = load_tokens(do, queries, do_token, SIZE, BLOCK_SIZE)
        lse_block, delta_block = tl.load(lse + queries), tl.load(delta + queries)
        scores = tl.dot(k_rows, tl.trans(q_block), input_precision="ieee")
        dk_acc, dv_acc = add_to_dk_dv(scores, scale, lse_block, delta_block, q_block, do_block, v_rows, dk_acc, dv_acc)

    for step in range(num_open, num_open + num_masked):
        queries = masked_tokens(listed, origin)
        listed = read_columns(columns, step + 1, first_dense, num_dense, first_near, BLOCK_COLUMNS)
        q_block = load_tokens(q, queries, q_token, SIZE, BLOCK_SIZE)
        do_block = load_tokens(do, queries, do_token, SIZE, BLOCK_SIZE)
        lse_block, delta_block = tl.load(lse + queries), tl.load(delta + queries)
        scores = tl.dot(k_rows, tl.trans(q_block), input_precision="ieee")
        scores = hide(scores, masks, BLOCK_ROWS, BLOCK_COLUMNS)
        masks += BLOCK_ROWS * (BLOCK_COLUMNS // 32)
        dk_acc, dv_acc = add_to_dk_dv(scores, scale, lse_block, delta_block, q_block, do_block, v_rows, dk_acc, dv_acc)

    owned = (batch.to(tl.int64) * num_keys * num_heads + head) * SIZE
    store_tokens(dk + owned, keys, num_heads * SIZE, dk_acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)
    store_tokens(dv + owned, keys, num_heads * SIZE, dv_acc, is_real, SIZE, BLOCK_SIZE)
