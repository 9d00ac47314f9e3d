"""CLEAR attention as an operator of PyTorch: `attend`, its tables, its gradients.

The operator knows no grid and no radius. A table says which rows (queries) see which columns (keys): tokens are cut
into blocks of rows, and each block visits its own list of columns, gathered by token index.

dtypes: float16, bfloat16; the interpreter also float32. Head sizes: up to 256, padded to a power of two.
Devices: NVIDIA from Ampere on; AMD where Triton runs. Gradients: query, key, value; once differentiable.
Deterministic: no atomics, a fixed order of columns. Accumulates in fp32. Any strides, 64-bit offsets.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .clear_table import Table
from .launch import block_size, log2_scale, on_device_of, rows_together, strides
from .tuning import Tile

NUM_TENSORS, NUM_NUMBERS = 5, 6  # of a table


def attend(query: Tensor, key: Tensor, value: Tensor, tables: Sequence[Table], scale: float) -> Tensor:
    """Return softmax(scale q k^T) v over the pairs of a table.

    Shapes:
        query: (B, H, N, D). key, value: (B, H, N + P, D), where P keys have no query. Output: (B, H, N, D), a view of
            (B, N, H, D).

    Args:
        tables: one for the forward pass; for gradients two more, with the same pairs: queries as rows, keys as rows.
        scale: at least 0.

    Returns:
        The output in the dtype of `query`.

    Notes:
        Every query sees a key, every key is seen: rows of no block are left as they were allocated.
    """
    tensors = [tensor for table in tables for tensor in table.tensors]
    numbers = [number for table in tables for number in table.numbers]
    out, _ = torch.ops.linearize.clear_forward(query, key, value, tensors, numbers, scale)
    return out.transpose(1, 2)


def clear_forward(
    query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, (B, N, H, D), and the log2 of each query's sum of exp2, (B, H, N) float32."""
    from .clear_forward import clear_forward_kernel

    kernel: Any = clear_forward_kernel
    query, key, value = (rows_together(tensor) for tensor in (query, key, value))
    out, lse = _like_output(query), _like_statistics(query)
    with _launch(query, tensors, numbers, 0) as (grid, table, sizes, options):
        kernel[grid](
            query, key, value, out, lse, *table, *strides(query, key, value),
            log2_scale(scale), query.shape[2], *sizes, **options,
        )  # fmt: skip
    return out, lse


def clear_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: list[Tensor],
    numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, (B, N, H, D) and twice (B, N + P, H, D)."""
    from .clear_backward import clear_dk_dv_kernel, clear_dq_kernel

    dq_kernel: Any = clear_dq_kernel
    dk_dv_kernel: Any = clear_dk_dv_kernel
    inputs = [rows_together(tensor) for tensor in (query, key, value, grad)]
    query, key, value, grad = inputs
    dq, dk, dv = (_like_output(tensor) for tensor in (query, key, value))
    delta = torch.empty_like(lse)
    with _launch(query, tensors, numbers, 1) as (grid, table, sizes, options):
        dq_kernel[grid](
            query, key, value, out, grad, lse, delta, dq, *table, *strides(*inputs),
            log2_scale(scale), query.shape[2], *sizes, **options,
        )  # fmt: skip
    with _launch(query, tensors, numbers, 2) as (grid, table, sizes, options):
        dk_dv_kernel[grid](
            query, key, value, grad, lse, delta, dk, dv, *table, *strides(*inputs),
            log2_scale(scale), query.shape[2], key.shape[2], *sizes, **options,
        )  # fmt: skip
    return dq, dk, dv


@contextlib.contextmanager
def _launch(query: Tensor, tensors: list[Tensor], numbers: list[int], index: int):
    """Yield grid, table tensors, sizes and compile-time options of one kernel, on the device of `query`."""
    table = tensors[NUM_TENSORS * index : NUM_TENSORS * (index + 1)]
    num_shared, num_tiles, *rest = numbers[NUM_NUMBERS * index : NUM_NUMBERS * (index + 1)]
    tile, (batch, heads, _, size) = Tile(*rest), query.shape
    options = {
        "SIZE": size,
        "BLOCK_SIZE": block_size(size),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    with on_device_of(query):
        grid = ((num_shared + num_tiles) * batch * heads,)
        yield grid, table, (heads, batch * heads, num_shared, num_tiles), options


def _like_output(tensor: Tensor) -> Tensor:
    batch, heads, tokens, size = tensor.shape
    return torch.empty((batch, tokens, heads, size), dtype=tensor.dtype, device=tensor.device)


def _like_statistics(query: Tensor) -> Tensor:
    return torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, tensors, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, *tensors)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    assert len(tensors) == 3 * NUM_TENSORS, "gradients need three tables"
    backward = torch.ops.linearize.clear_backward
    gradients = backward(grad.transpose(1, 2), query, key, value, out, lse, tensors, ctx.numbers, ctx.scale)
    return *(gradient.transpose(1, 2) for gradient in gradients), [None] * len(tensors), None, None


def _forward_shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_output(query), _like_statistics(query)


def _backward_shapes(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return _like_output(query), _like_output(key), _like_output(value)


def _refuse(*_: Any) -> None:
    raise RuntimeError("the gradients of CLEAR attention cannot be differentiated again")


def _define() -> torch.library.Library | None:
    """Define the operators once per process: ComfyUI and a library user may import the pack under two names."""
    if hasattr(torch.ops.linearize, "clear_forward"):
        return None
    library = torch.library.Library("linearize", "DEF")
    table = "Tensor[] tensors, int[] numbers, float scale"
    saved = "Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse"
    library.define(f"clear_forward(Tensor query, Tensor key, Tensor value, {table}) -> (Tensor, Tensor)")
    library.define(f"clear_backward({saved}, {table}) -> (Tensor, Tensor, Tensor)")
    for function in (clear_forward, clear_backward):
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
    forward, backward = "linearize::clear_forward", "linearize::clear_backward"
    torch.library.register_fake(forward, _forward_shapes, lib=library)
    torch.library.register_fake(backward, _backward_shapes, lib=library)
    torch.library.register_autograd(forward, _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(backward, _refuse, lib=library)
    return library


_library = _define()  # an operator lives as long as its library
