"""Foveated attention's backward kernels: gradients of queries, of keys and values, of means and their bias. No atomics.

With p = exp2(s - lse) and delta = rowsum(do o), summed over what each token or mean sees, ds = p (do v^T - delta):
dq = scale sum ds k,   dk = scale sum ds q,   dv = sum p do,   dbias = sum ds.
Each program owns its rows and visits columns in the order of its list, so results repeat bit for bit.
"""

import triton
import triton.language as tl

from .foveated_forward import BURIED
from .foveated_reader import COUNTS, listed_places, locate, read_list, read_places, read_rows, read_shift
from .tokens import NEVER, load_tokens, store_tokens

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_to_dq(scores, delta, do, k, v, dq):
    """Add what some keys give: ds = p (do v^T - delta), dq = sum ds k; the scores are less lse."""
    p = tl.exp2(scores)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTS)
def foveated_dq_kernel(
    q, k, v, mean_k, mean_v, bias, out, do, lse, delta, dq,
    query_tokens, key_tokens, cell_ids, cell_fields, mean_ids, mean_fields, hidden,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    mean_k_batch: tl.int64, mean_k_head: tl.int64, mean_k_token: tl.int64,
    mean_v_batch: tl.int64, mean_v_head: tl.int64, mean_v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_tokens, num_heads, num_copies, num_globals, num_owners, num_parts, num_in_row, num_in_column,
    num_places, num_means,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dq` (B, N, H, D), and `delta` (B, H, places of queries), of one block of queries; loops as in forward."""
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
    owned = (batch.to(tl.int64) * num_tokens * num_heads + head) * SIZE
    q_rows = load_tokens(q + batch * q_batch + head * q_head, queries, q_token, SIZE, BLOCK_SIZE)
    do_rows = load_tokens(do + batch * do_batch + head * do_head, queries, do_token, SIZE, BLOCK_SIZE)
    out_rows = load_tokens(out + owned, queries, num_heads * SIZE, SIZE, BLOCK_SIZE)
    delta_rows = tl.where(is_real, tl.sum(do_rows.to(tl.float32) * out_rows.to(tl.float32), 1), 0.0)
    statistics = copy.to(tl.int64) * (num_globals + num_owners * num_in_row) + places
    tl.store(delta + statistics, delta_rows, mask=is_own)
    lse_rows = tl.load(lse + statistics, mask=is_own, other=BURIED)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    # steps without a mask: of the global keys, and of whole cells
    num_open = tl.where(is_shared, 0, num_globals // BLOCK_COLUMNS * BLOCK_COLUMNS)
    first_slot = num_whole.to(tl.int32) * num_in_column // BLOCK_COLUMNS * BLOCK_COLUMNS
    place = read_places(0, 0, num_open, 0, cell_ids, num_cells, num_globals, num_in_column, BLOCK_COLUMNS)
    listed = tl.load(key_tokens + place, mask=place >= 0, other=0)
    for step in range((num_open + first_slot) // BLOCK_COLUMNS):
        keys = listed
        place = read_places(step + 1, 0, num_open, 0, cell_ids, num_cells, num_globals, num_in_column, BLOCK_COLUMNS)
        listed = tl.load(key_tokens + place, mask=place >= 0, other=0)
        k_block = load_tokens(k, keys, k_token, SIZE, BLOCK_SIZE)
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        acc = add_to_dq(scores * scale - lse_rows[:, None], delta_rows, do_rows, k_block, v_block, acc)

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
        v_block = load_tokens(v, keys, v_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee") * scale + shift[None, :]
        acc = add_to_dq(scores - lse_rows[:, None], delta_rows, do_rows, k_block, v_block, acc)

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
        v_block = load_tokens(mean_v, keys, mean_v_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee") * scale + shift[None, :]
        acc = add_to_dq(scores - lse_rows[:, None], delta_rows, do_rows, k_block, v_block, acc)

    store_tokens(dq + owned, queries, num_heads * SIZE, acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)


@triton.jit
def add_to_dk_dv(scores, delta, q, do, v, dk, dv):
    """Add what some queries give, and return ds; the scores are less lse. All is transposed, (keys, queries)."""
    p = tl.exp2(scores)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return ds, dk, dv


@triton.jit(do_not_specialize=COUNTS)
def foveated_dk_dv_kernel(
    q, k, v, do, lse, delta, dk, dv,
    key_tokens, query_tokens, tile_ids, tile_fields,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_tokens, num_heads, num_copies, num_globals, num_owners, num_parts, num_in_row, num_in_column,
    num_places,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dk` and `dv` (B, N, H, D) of one block of keys, a cell or some global ones: columns are queries."""
    copy, is_shared, block = locate(tl.cdiv(num_globals, BLOCK_ROWS), num_owners * num_parts, num_copies)
    batch, head = copy // num_heads, copy % num_heads
    _place, _own, rows, cell = read_rows(key_tokens, is_shared, block, num_globals, num_parts, num_in_row, BLOCK_ROWS)
    first_tile, num_listed, _rest = read_list(tile_fields, copy * num_owners + cell, is_shared)
    tile_ids += first_tile
    num_dense = tl.where(is_shared, num_places, num_globals)
    dense_steps = tl.cdiv(num_dense, BLOCK_COLUMNS)

    is_real, keys = rows >= 0, tl.maximum(rows, 0)
    q += batch * q_batch + head * q_head
    do += batch * do_batch + head * do_head
    lse += copy.to(tl.int64) * num_places
    delta += copy.to(tl.int64) * num_places
    k_rows = load_tokens(k + batch * k_batch + head * k_head, keys, k_token, SIZE, BLOCK_SIZE)
    v_rows = load_tokens(v + batch * v_batch + head * v_head, keys, v_token, SIZE, BLOCK_SIZE)

    dk_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    dv_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    for step in range(dense_steps + tl.cdiv(num_listed * num_in_column, BLOCK_COLUMNS)):
        place = read_places(step, 0, num_dense, 0, tile_ids, num_listed, num_globals, num_in_column, BLOCK_COLUMNS)
        queries = tl.maximum(tl.load(query_tokens + place, mask=place >= 0, other=0), 0)
        q_block = load_tokens(q, queries, q_token, SIZE, BLOCK_SIZE)
        do_block = load_tokens(do, queries, do_token, SIZE, BLOCK_SIZE)
        lse_columns = tl.load(lse + place, mask=place >= 0, other=BURIED)
        delta_columns = tl.load(delta + place, mask=place >= 0, other=0.0)
        scores = tl.dot(k_rows, tl.trans(q_block), input_precision="ieee") * scale - lse_columns[None, :]
        _ds, dk_acc, dv_acc = add_to_dk_dv(scores, delta_columns, q_block, do_block, v_rows, dk_acc, dv_acc)

    owned = (batch.to(tl.int64) * num_tokens * num_heads + head) * SIZE
    store_tokens(dk + owned, keys, num_heads * SIZE, dk_acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)
    store_tokens(dv + owned, keys, num_heads * SIZE, dv_acc, is_real, SIZE, BLOCK_SIZE)


@triton.jit
def hide(scores, hidden, starts, first_mean, num_words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return `scores` (means, queries) with NEVER where the tile of a query does not see a mean."""
    group, bit = tl.arange(0, ROWS // 32)[:, None], tl.arange(0, 32)[None, :, None]
    word = (first_mean >> 5) + group
    words = tl.load(hidden + starts[None, :] + word, mask=word < num_words, other=-1)[:, None, :]
    return tl.where(tl.reshape((words >> bit) & 1, [ROWS, COLUMNS]) != 0, NEVER, scores)


@triton.jit(do_not_specialize=COUNTS)
def foveated_means_kernel(
    q, k, v, bias, do, lse, delta, dk, dv, dbias,
    query_tokens, tile_ids, tile_fields, hidden, words,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_heads, num_globals, num_in_column, num_places, num_means, num_words, num_tiles,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dk` and `dv` (B, M, H, D) and `dbias` (B, H, M) of a block of means: columns are queries."""
    num_blocks = tl.cdiv(num_means, BLOCK_ROWS)
    copy, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    batch, head = copy // num_heads, copy % num_heads
    row, column = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    is_real, means = row < num_means, tl.minimum(row, num_means - 1)
    first_tile, num_listed, _rest = read_list(tile_fields, copy * num_blocks + block, 0)
    tile_ids += first_tile
    words += copy * num_tiles

    q += batch * q_batch + head * q_head
    do += batch * do_batch + head * do_head
    lse += copy.to(tl.int64) * num_places
    delta += copy.to(tl.int64) * num_places
    k_rows = load_tokens(k + batch * k_batch + head * k_head, means, k_token, SIZE, BLOCK_SIZE)
    v_rows = load_tokens(v + batch * v_batch + head * v_head, means, v_token, SIZE, BLOCK_SIZE)
    shift = tl.load(bias + head * num_means + means)

    dk_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    dv_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    dbias_acc = tl.zeros([BLOCK_ROWS], tl.float32)
    for step in range(tl.cdiv(num_listed * num_in_column, BLOCK_COLUMNS)):
        place, tiles = listed_places(step * BLOCK_COLUMNS + column, tile_ids, num_listed, num_globals, num_in_column)
        queries = tl.maximum(tl.load(query_tokens + place, mask=place >= 0, other=0), 0)
        q_block = load_tokens(q, queries, q_token, SIZE, BLOCK_SIZE)
        do_block = load_tokens(do, queries, do_token, SIZE, BLOCK_SIZE)
        lse_columns = tl.load(lse + place, mask=place >= 0, other=BURIED)
        delta_columns = tl.load(delta + place, mask=place >= 0, other=0.0)
        starts = tl.load(words + tiles, mask=place >= 0, other=0)
        scores = tl.dot(k_rows, tl.trans(q_block), input_precision="ieee") * scale + shift[:, None]
        scores = hide(scores, hidden, starts, block * BLOCK_ROWS, num_words, BLOCK_ROWS, BLOCK_COLUMNS)
        ds, dk_acc, dv_acc = add_to_dk_dv(
            scores - lse_columns[None, :], delta_columns, q_block, do_block, v_rows, dk_acc, dv_acc
        )
        dbias_acc += tl.sum(ds, 1)

    owned = (batch.to(tl.int64) * num_means * num_heads + head) * SIZE
    store_tokens(dk + owned, means, num_heads * SIZE, dk_acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)
    store_tokens(dv + owned, means, num_heads * SIZE, dv_acc, is_real, SIZE, BLOCK_SIZE)
    tl.store(dbias + copy * num_means + means, dbias_acc, mask=is_real)
