"""What all kernels share: rows of tokens, loaded and stored, and the online softmax. Device functions only."""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)  # the score of a key that is not seen; finite, so that differences are numbers


@triton.jit
def load_tokens(pointer, tokens, stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return (tokens, BLOCK_SIZE) values of one head, zero beyond SIZE."""
    place = tl.arange(0, BLOCK_SIZE)
    # a view of a fused projection passes 2^31 values at 100,000 tokens
    pointers = pointer + tokens.to(tl.int64)[:, None] * stride + place[None, :]
    if SIZE < BLOCK_SIZE:
        return tl.load(pointers, mask=place[None, :] < SIZE, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tokens(pointer, tokens, stride, values, is_real, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Store the rows of `values` that are real."""
    place = tl.arange(0, BLOCK_SIZE)
    pointers = pointer + tokens.to(tl.int64)[:, None] * stride + place[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=is_real[:, None] & (place[None, :] < SIZE))


@triton.jit
def absorb(scores, scale, v, top, total, acc):
    """Add keys to an online softmax: p = exp2(scale scores - top), total = sum p, acc = sum p v."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc
