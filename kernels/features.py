"""What the kernels with a linear part share: feature maps that are computed as numbers are loaded, states, row masks.

Device functions only. MAP is what numbers are: "given" features, "logs" of features, or the name of an elementwise map
that makes features of them. Kernels that weigh linear keys against exact ones take logs of all but given features.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(1.0e-30)  # of a denominator without exact keys
TINY = tl.constexpr(1.0e-30)  # of a feature whose log is taken
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def apply_map(x, MAP: tl.constexpr):
    """Return fp32 features of fp32 numbers."""
    if MAP == "elu1":
        return tl.where(x < 0, tl.exp(tl.minimum(x, 0.0)), x + 1.0)
    elif MAP == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def log2_of_map(x, MAP: tl.constexpr):
    """Return the log2 of features of fp32 numbers, which may be their natural logs."""
    if MAP == "elu1":
        return tl.where(x < 0, x * LOG2E, tl.log2(tl.maximum(x, 0.0) + 1.0))
    elif MAP == "relu":
        return tl.log2(tl.maximum(x, TINY))
    else:
        return x * LOG2E


@triton.jit
def weights_of(x, exists, z, lse, MAP: tl.constexpr):
    """Return exp2(log2 phi + z - lse), what features weigh of a denominator; zero where there is no number."""
    return tl.exp2(tl.where(exists, log2_of_map(x, MAP) + z[None, :] - lse[:, None], float("-inf")))


@triton.jit
def slope_of_log(x, MAP: tl.constexpr):
    """Return the derivative of the natural log of features."""
    if MAP == "elu1":
        return 1.0 / (tl.maximum(x, 0.0) + 1.0)
    elif MAP == "relu":
        return tl.where(x > TINY, 1.0 / tl.maximum(x, TINY), 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def load_numbers(pointer, tokens, stride, is_real, place, FEATURES: tl.constexpr):
    """Return (tokens, places) fp32 numbers of one head and which of them exist; the others are zero."""
    exists = is_real[:, None] & (place < FEATURES)[None, :]
    pointers = pointer + tokens.to(tl.int64)[:, None] * stride + place[None, :]
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32), exists


@triton.jit
def load_numbers_by_place(pointer, tokens, stride, is_real, place, FEATURES: tl.constexpr):
    """Return the same as (places, tokens): a product takes its rows without turning registers around."""
    exists = (place < FEATURES)[:, None] & is_real[None, :]
    pointers = pointer + place[:, None] + tokens.to(tl.int64)[None, :] * stride
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32), exists


@triton.jit
def load_state(state, norm, place, FEATURES: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return some rows of a head's state (places, BLOCK_SIZE) and of its norm, zero where there is none."""
    value, is_real = tl.arange(0, BLOCK_SIZE), place < FEATURES
    exists = is_real[:, None] & (value < SIZE)[None, :]
    rows = tl.load(state + place[:, None] * SIZE + value[None, :], mask=exists, other=0.0)
    return rows, tl.load(norm + place, mask=is_real, other=0.0)


@triton.jit
def store_numbers(pointer, tokens, values, exists, place, FEATURES: tl.constexpr):
    """Store (tokens, places) numbers of one head that exist, rows side by side."""
    pointers = pointer + tokens.to(tl.int64)[:, None] * FEATURES + place[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=exists)
