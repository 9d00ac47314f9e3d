"""The forward kernel of exact and linear keys under one denominator.

    o = (sum exp(s - c) v + phi S) / (sum exp(s - c) + phi z),   s = scale q . k,   c = max s

An online softmax over the exact keys ends with the exact maximum c, so the linear part is added once, in the epilogue,
without a factor. S is centred: S = S' + z m^T, so that what is rounded is small; phi z is computed in fp32 throughout.
On the raw scale (MAP is not "given") features are keys too, with score log phi + log z and value S / z: the online
softmax goes on over them, and `state` and `norm` hold S / z and log2 z.
"""

import triton
import triton.language as tl

from .features import FLOOR, load_numbers, load_state, log2_of_map
from .tokens import NEVER, absorb, load_tokens, store_tokens


@triton.jit
def visit(q_rows, k, v, first, num_keys, k_token, v_token, scale, top, total, acc,
          SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
          IS_LAST: tl.constexpr):  # fmt: skip
    """Add a step of keys to the online softmax; in the last one some may not exist."""
    keys = first + tl.arange(0, BLOCK_COLUMNS)
    tokens = tl.minimum(keys, num_keys - 1)
    k_block = load_tokens(k, tokens, k_token, SIZE, BLOCK_SIZE)
    scores = tl.dot(q_rows, tl.trans(k_block), input_precision="ieee")
    if IS_LAST:
        scores = tl.where((keys < num_keys)[None, :], scores, NEVER)
    v_block = load_tokens(v, tokens, v_token, SIZE, BLOCK_SIZE)
    return absorb(scores, scale, v_block, top, total, acc)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads"])
def mapped_forward_kernel(
    q, k, v, x, exact, state, norm, centre, out, lse, den,
    q_batch: tl.int64, q_head: tl.int64, q_token: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_token: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_token: tl.int64,
    x_batch: tl.int64, x_head: tl.int64, x_token: tl.int64,
    exact_batch: tl.int64, exact_head: tl.int64, exact_token: tl.int64,
    scale, num_queries, num_keys, num_heads,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, HAS_EXACT: tl.constexpr, FEATURE_STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `out` (B, H, M, D), and (B, H, M) `den` and `lse` = c + log2 den, of one block of queries."""
    copy = tl.program_id(1).to(tl.int64)
    batch, head = copy // num_heads, copy % num_heads
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_real, queries = rows < num_queries, tl.minimum(rows, num_queries - 1)
    q_rows = load_tokens(q + batch * q_batch + head * q_head, queries, q_token, SIZE, BLOCK_SIZE)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    x += batch * x_batch + head * x_head

    top = tl.full([BLOCK_ROWS], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    if HAS_EXACT:  # softmax attention that somebody else computed, of weight 1 in all
        total += 1.0
        exact += batch * exact_batch + head * exact_head
        acc = load_tokens(exact, queries, exact_token, SIZE, BLOCK_SIZE).to(tl.float32)
    else:
        whole = num_keys // BLOCK_COLUMNS * BLOCK_COLUMNS
        for first in range(0, whole, BLOCK_COLUMNS):
            top, total, acc = visit(q_rows, k, v, first, num_keys, k_token, v_token, scale, top, total, acc,
                                    SIZE, BLOCK_SIZE, BLOCK_COLUMNS, False)  # fmt: skip
        if whole < num_keys:
            top, total, acc = visit(q_rows, k, v, whole, num_keys, k_token, v_token, scale, top, total, acc,
                                    SIZE, BLOCK_SIZE, BLOCK_COLUMNS, True)  # fmt: skip

    state += copy * FEATURES * SIZE
    norm += copy * FEATURES
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in tl.range(0, FEATURES, BLOCK_FEATURES, num_stages=FEATURE_STAGES):
        place = first + tl.arange(0, BLOCK_FEATURES)
        numbers, _ = load_numbers(x, queries, x_token, is_real, place, FEATURES)
        state_rows, z = load_state(state, norm, place, FEATURES, SIZE, BLOCK_SIZE)
        if MAP == "given":
            weight += tl.sum(numbers * z[None, :], 1)
            acc = tl.dot(numbers.to(state_rows.dtype), state_rows, acc, input_precision=PRECISION)
        else:
            z = tl.where(place < FEATURES, z, NEVER)
            top, total, acc = absorb(log2_of_map(numbers, MAP) + z[None, :], 1.0, state_rows, top, total, acc)

    if MAP == "given":
        value = tl.arange(0, BLOCK_SIZE)
        mean = tl.load(centre + copy * SIZE + value, mask=value < SIZE, other=0.0)
        acc += weight[:, None] * mean[None, :]
        total = tl.maximum(total + weight, FLOOR)
    acc /= total[:, None]
    store_tokens(out + copy * num_queries * SIZE, queries, SIZE, acc, is_real, SIZE, BLOCK_SIZE)
    tl.store(lse + copy * num_queries + queries, top + tl.log2(total), mask=is_real)
    tl.store(den + copy * num_queries + queries, total, mask=is_real)
