"""The kernel that sums up linear keys, and in the backward pass what queries ask of their state.

    total = sum phi^T y,  norm = sum phi;   with weights  total = sum phi^T y / den,  norm = -sum phi delta / den

On the raw scale (weights, and MAP is not "given") exp2(log2 phi + log2 z - lse) takes the place of phi / den. A program
owns some features of one head and visits one share of the tokens; shares are added by the caller.
"""

import triton
import triton.language as tl

from .features import apply_map, load_numbers_by_place, log2_of_map
from .tokens import load_tokens


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_copies", "share"])
def state_kernel(
    x, y, log2_z, lse, den, delta, total, norm,
    x_batch: tl.int64, x_head: tl.int64, x_token: tl.int64,
    y_batch: tl.int64, y_head: tl.int64, y_token: tl.int64,
    num_tokens, num_heads, num_copies, share,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FEATURES: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, IS_WEIGHTED: tl.constexpr, FEATURE_STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one share of `total` (shares, B H, F, D) and of `norm` (shares, B H, F): rows are features."""
    copy = tl.program_id(1).to(tl.int64)
    batch, head = copy // num_heads, copy % num_heads
    place, value = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_SIZE)
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    IS_RAW: tl.constexpr = IS_WEIGHTED and MAP != "given"
    if IS_RAW:
        z = tl.load(log2_z + copy * FEATURES + place, mask=place < FEATURES, other=0.0)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    start = tl.program_id(2) * share
    stop = tl.minimum(start + share, num_tokens)
    STAGES: tl.constexpr = FEATURE_STAGES if IS_WEIGHTED and MAP == "given" else None  # of the launch
    for first in tl.range(start, stop, BLOCK_COLUMNS, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        is_real, tokens = columns < stop, tl.minimum(columns, num_tokens - 1)
        numbers, exists = load_numbers_by_place(x, tokens, x_token, is_real, place, FEATURES)
        if IS_RAW:
            score = log2_of_map(numbers, MAP) + z[:, None] - tl.load(lse + copy * num_tokens + tokens)[None, :]
            phi = tl.exp2(tl.where(exists, score, float("-inf")))
        elif IS_WEIGHTED:
            phi = numbers / tl.load(den + copy * num_tokens + tokens)[None, :]
        else:
            phi = tl.where(exists, apply_map(numbers, MAP), 0.0)
        y_block = load_tokens(y, tokens, y_token, SIZE, BLOCK_SIZE)
        if IS_WEIGHTED:
            weight -= tl.sum(phi * tl.load(delta + copy * num_tokens + tokens)[None, :], 1)
        else:
            weight += tl.sum(phi, 1)
        # features of float16 models may exceed its range
        if y_block.dtype != tl.bfloat16:
            y_block = y_block.to(tl.float32)
        acc = tl.dot(phi.to(y_block.dtype), y_block, acc, input_precision=PRECISION)

    row = (tl.program_id(2).to(tl.int64) * num_copies + copy) * FEATURES + place
    is_feature = place < FEATURES
    tl.store(total + row[:, None] * SIZE + value[None, :], acc, mask=is_feature[:, None] & (value < SIZE)[None, :])
    tl.store(norm + row, weight, mask=is_feature)
