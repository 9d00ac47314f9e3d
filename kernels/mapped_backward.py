"""The backward kernels of exact and linear keys under one denominator. No atomics.

With p = exp2(s - lse), delta = rowsum(do o) and den the whole denominator, the exact half is that of any softmax:
ds = p (do v^T - delta). The linear half is dphi = (do S^T - delta z) / den. The linear part does not cancel the maximum
c, so c has a gradient, -sum ds, which goes to the first key with the largest score. (It equals phi . dphi, but that
difference of large numbers suffers from the rounding of o, where linear keys have most of the weight.)

On the raw scale (MAP is not "given") c cancels and has none. Features are keys, with p = exp2(log2 phi + log2 z - lse):
dlog phi = p (do (S / z)^T - delta).
"""

import triton
import triton.language as tl

from .features import FLOOR, load_numbers, load_state, slope_of_log, store_numbers, weights_of
from .tokens import NEVER, load_tokens, store_tokens

LN2 = tl.constexpr(0.6931471805599453)
NO_QUERY = tl.constexpr(1.0e38)  # as the log of a denominator: nothing weighs anything


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def mapped_dx_kernel(
    x, do, out, state, norm, centre, lse, den, delta, dx,
    x_batch: tl.int64, x_head: tl.int64, x_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    num_queries, num_heads,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dx` (B, H, M, F), the gradient of numbers, and `delta` (B, H, M), of one block of queries."""
    copy = tl.program_id(1).to(tl.int64)
    batch, head = copy // num_heads, copy % num_heads
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_real, queries = rows < num_queries, tl.minimum(rows, num_queries - 1)
    do_rows = load_tokens(do + batch * do_batch + head * do_head, queries, do_token, SIZE, BLOCK_SIZE)
    out_rows = load_tokens(out + copy * num_queries * SIZE, queries, SIZE, SIZE, BLOCK_SIZE)
    statistics = copy * num_queries + queries
    lse_rows, den_rows = tl.load(lse + statistics), tl.load(den + statistics)
    delta_rows = tl.sum(do_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    # a denominator at its floor is a constant
    delta_rows = tl.where(den_rows > FLOOR, delta_rows, 0.0)
    tl.store(delta + statistics, delta_rows, mask=is_real)

    value = tl.arange(0, BLOCK_SIZE)
    mean = tl.load(centre + copy * SIZE + value, mask=value < SIZE, other=0.0)
    shift = tl.sum(do_rows.to(tl.float32) * mean[None, :], 1) - delta_rows
    state += copy * FEATURES * SIZE
    norm += copy * FEATURES
    x += batch * x_batch + head * x_head
    dx += copy * num_queries * FEATURES
    for first in range(0, FEATURES, BLOCK_FEATURES):
        place = first + tl.arange(0, BLOCK_FEATURES)
        numbers, exists = load_numbers(x, queries, x_token, is_real, place, FEATURES)
        state_rows, z = load_state(state, norm, place, FEATURES, SIZE, BLOCK_SIZE)
        dphi = tl.dot(do_rows.to(state_rows.dtype), tl.trans(state_rows), input_precision=PRECISION)
        if MAP == "given":
            dphi = (dphi + shift[:, None] * z[None, :]) / den_rows[:, None]
        else:
            p = weights_of(numbers, exists, z, lse_rows, MAP)
            dphi = p * (dphi + shift[:, None]) * slope_of_log(numbers, MAP)
        store_numbers(dx, queries, dphi, exists, place, FEATURES)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads"])
def mapped_dq_kernel(
    q, k, v, do, lse, den, delta, pull, top_key, dq,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_queries, num_keys, num_heads,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, MAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dq` (B, H, M, D), and per query `pull` = dc and `top_key`, the key that gets it."""
    copy = tl.program_id(1).to(tl.int64)
    batch, head = copy // num_heads, copy % num_heads
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_real, queries = rows < num_queries, tl.minimum(rows, num_queries - 1)
    statistics = copy * num_queries + queries
    den_rows, delta_rows = tl.load(den + statistics), tl.load(delta + statistics)
    do_rows = load_tokens(do + batch * do_batch + head * do_head, queries, do_token, SIZE, BLOCK_SIZE)
    q_rows = load_tokens(q + batch * q_batch + head * q_head, queries, q_token, SIZE, BLOCK_SIZE)
    # relative to the maximum, and divided at the end: a large denominator would make float16 underflow
    top_rows = tl.load(lse + statistics) - tl.log2(den_rows)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    best = tl.full([BLOCK_ROWS], -1.0e38, tl.float32)
    best_key = tl.zeros([BLOCK_ROWS], tl.int32)
    pull_rows = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    # without a loop of its own for whole steps: the two together spill
    for first in range(0, num_keys, BLOCK_COLUMNS):
        keys = first + tl.arange(0, BLOCK_COLUMNS)
        tokens = tl.minimum(keys, num_keys - 1)
        k_block = load_tokens(k, tokens, k_token, SIZE, BLOCK_SIZE)
        v_block = load_tokens(v, tokens, v_token, SIZE, BLOCK_SIZE)
        scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
        scores = tl.where((keys < num_keys)[None, :], scores, NEVER)
        largest = tl.max(scores, 1)
        # fewer registers than an argmax, which carries indices along
        place = tl.min(tl.where(scores == largest[:, None], tokens[None, :], num_keys), 1)
        best_key = tl.where(largest > best, place, best_key)
        best = tl.maximum(best, largest)
        p = tl.exp2(scores * scale - top_rows[:, None])
        ds = p * (tl.dot(do_rows, tl.trans(v_block), input_precision="ieee") - delta_rows[:, None])
        pull_rows -= tl.sum(ds, 1)
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision="ieee")

    acc /= den_rows[:, None]
    pull_rows = pull_rows / den_rows if MAP == "given" else tl.zeros_like(pull_rows)
    if num_keys > 0:
        acc += pull_rows[:, None] * load_tokens(k, best_key, k_token, SIZE, BLOCK_SIZE).to(tl.float32)
    tl.store(pull + statistics, pull_rows, mask=is_real)
    tl.store(top_key + statistics, best_key, mask=is_real)
    store_tokens(dq + copy * num_queries * SIZE, queries, SIZE, acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads"])
def mapped_dk_dv_kernel(
    q, k, v, do, lse, delta, pull, top_key, dk, dv,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_token: tl.int64,
    scale, num_queries, num_keys, num_heads,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `dk` and `dv` (B, H, K, D) of one block of keys: rows are keys, columns queries."""
    copy = tl.program_id(1).to(tl.int64)
    batch, head = copy // num_heads, copy % num_heads
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_real, keys = rows < num_keys, tl.minimum(rows, num_keys - 1)
    k_rows = load_tokens(k + batch * k_batch + head * k_head, keys, k_token, SIZE, BLOCK_SIZE)
    v_rows = load_tokens(v + batch * v_batch + head * v_head, keys, v_token, SIZE, BLOCK_SIZE)
    q += batch * q_batch + head * q_head
    do += batch * do_batch + head * do_head

    dk_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    dv_acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    for first in range(0, num_queries, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        exists, queries = columns < num_queries, tl.minimum(columns, num_queries - 1)
        q_block = load_tokens(q, queries, q_token, SIZE, BLOCK_SIZE)
        do_block = load_tokens(do, queries, do_token, SIZE, BLOCK_SIZE)
        statistics = copy * num_queries + queries
        top = tl.load(lse + statistics, mask=exists, other=NO_QUERY)
        part = tl.load(delta + statistics)
        more = tl.load(pull + statistics, mask=exists, other=0.0)
        best_key = tl.load(top_key + statistics)
        p = tl.exp2(tl.dot(k_rows, tl.trans(q_block), input_precision="ieee") * scale - top[None, :])
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision="ieee")
        ds = p * (tl.dot(v_rows, tl.trans(do_block), input_precision="ieee") - part[None, :])
        ds += tl.where(best_key[None, :] == rows[:, None], more[None, :], 0.0)
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision="ieee")

    owned = copy * num_keys * SIZE
    store_tokens(dk + owned, keys, SIZE, dk_acc * (scale * LN2), is_real, SIZE, BLOCK_SIZE)
    store_tokens(dv + owned, keys, SIZE, dv_acc, is_real, SIZE, BLOCK_SIZE)
