"""Foveated attention as an operator of PyTorch: `foveated_attend`, its gradients.

The operator knows no grid. Tokens are cut into tiles of queries and cells of keys. A table says for each tile which
cells it sees exactly, and which means of others, whose scores have a bias. Global tokens see, and are seen by, all.

dtypes: float16, bfloat16; the interpreter also float32. Head sizes: up to 256, padded to a power of two.
Devices: NVIDIA from Ampere on; AMD where Triton runs. Gradients: query, key, value, means, bias; once differentiable.
Deterministic: no atomics, a fixed order of columns. Accumulates in fp32. Any strides, 64-bit offsets.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .capability import architecture
from .foveated_table import WORD, FoveatedTable, blocks_of_means, cells_of, means_of, turned
from .launch import block_size, log2_scale, on_device_of, rows_together, strides
from .tuning import Tile, of_rows, tile_for

_NUM_GIVEN = 8  # tensors that are saved before those of the table


def foveated_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    bias: Tensor,
    table: FoveatedTable,
    scale: float,
) -> Tensor:
    """Return softmax attention over the tokens and the means that a table names.

    A token scores scale q . k, a mean scale q . mean + bias.

    Shapes:
        query, key, value: (B, H, N, D). mean_key, mean_value: (B, H, M, D). bias: (M,) or (H, M).
        Output: (B, H, N, D), a view of (B, N, H, D).

    Args:
        table: every token of it is seen somewhere; each tile sees a token or a mean.
        scale: at least 0.

    Returns:
        The output in the dtype of `query`.
    """
    given = query, key, value, mean_key, mean_value, bias.float().expand(query.shape[1], -1)
    out, _ = torch.ops.linearize.foveated_forward(*given, table.tensors, table.numbers, scale)
    return out.transpose(1, 2)


def foveated_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    bias: Tensor,
    tensors: list[Tensor],
    numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output, (B, N, H, D), and the log2 of the sum of exp2 at each place of a query, (B, H, G + U n)."""
    from .foveated_forward import foveated_forward_kernel

    kernel: Any = foveated_forward_kernel
    table = _table(tensors, numbers)
    inputs = [rows_together(each) for each in (query, key, value, mean_key, mean_value)]
    out, lse = _like_output(query), _like_statistics(query, table.queries)
    grid, sizes, options = _cut("foveated_forward", query, table, table.num_tiles, table.tile_size)
    with on_device_of(query):
        kernel[grid](
            *inputs, _in_log2(bias), out, lse, *_seen(table, query), *strides(*inputs), log2_scale(scale), *sizes,
            table.cell_size, len(table.keys), mean_key.shape[2], **options,
        )  # fmt: skip
    return out, lse


def foveated_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: list[Tensor],
    numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value (B, N, H, D), of means (B, M, H, D), and of the bias (H, M)."""
    table, bias = _table(tensors, numbers), _in_log2(bias)
    inputs = [rows_together(each) for each in (query, key, value, mean_key, mean_value, grad)]
    query, key, value, mean_key, mean_value, grad = inputs
    with on_device_of(query):
        dq, delta = _gradient_of_queries(inputs, bias, out, lse, table, scale)
        dk, dv = _gradients_of_tokens([query, key, value, grad], lse, delta, table, scale)
        means = _gradients_of_means([query, mean_key, mean_value, grad], bias, lse, delta, table, scale)
    return dq, dk, dv, *means


def _gradient_of_queries(
    inputs: list[Tensor], bias: Tensor, out: Tensor, lse: Tensor, table: FoveatedTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Return dq, and delta = rowsum(do o) at the places of queries."""
    from .foveated_backward import foveated_dq_kernel

    kernel: Any = foveated_dq_kernel
    query, mean_key, grad = inputs[0], inputs[3], inputs[5]
    dq, delta = _like_output(query), torch.empty_like(lse)
    grid, sizes, options = _cut("foveated_dq", query, table, table.num_tiles, table.tile_size)
    kernel[grid](
        *inputs[:5], bias, out, grad, lse, delta, dq, *_seen(table, query), *strides(*inputs), log2_scale(scale),
        *sizes, table.cell_size, len(table.keys), mean_key.shape[2], **options,
    )  # fmt: skip
    return dq, delta


def _gradients_of_tokens(
    inputs: list[Tensor], lse: Tensor, delta: Tensor, table: FoveatedTable, scale: float
) -> tuple[Tensor, Tensor]:
    from .foveated_backward import foveated_dk_dv_kernel

    kernel: Any = foveated_dk_dv_kernel
    query, key, value, _ = inputs
    dk, dv = _like_output(key), _like_output(value)
    seen_by = turned(table.cell_ids, table.num_cells, query.shape[0] * query.shape[1])
    grid, sizes, options = _cut("foveated_dk_dv", query, table, table.num_cells, table.cell_size)
    kernel[grid](
        *inputs, lse, delta, dk, dv, table.keys, table.queries, *seen_by, *strides(*inputs), log2_scale(scale),
        *sizes, table.tile_size, len(table.queries), **options,
    )  # fmt: skip
    return dk, dv


def _gradients_of_means(
    inputs: list[Tensor], bias: Tensor, lse: Tensor, delta: Tensor, table: FoveatedTable, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of keys and values of means, and of the bias, (H, M)."""
    from .foveated_backward import foveated_means_kernel

    kernel: Any = foveated_means_kernel
    query, mean_key, mean_value, grad = inputs
    batch, heads, _, size = query.shape
    means, copies = mean_key.shape[2], batch * heads
    dk, dv = _like_output(mean_key), _like_output(mean_value)
    dbias = torch.empty((batch, heads, means), dtype=torch.float32, device=query.device)
    tile = tile_for("foveated_means", architecture(query.device), size)
    seen_by, hidden, words = blocks_of_means(table, means, tile.rows, copies)
    kernel[-(-means // tile.rows) * copies,](
        query, mean_key, mean_value, bias, grad, lse, delta, dk, dv, dbias,
        table.queries, *seen_by, hidden, words, *strides(*inputs), log2_scale(scale), heads, table.num_globals,
        table.tile_size, len(table.queries), means, -(-means // WORD), table.num_tiles,
        **_options(tile, size),
    )  # fmt: skip
    return dk, dv, dbias.sum(0)


def _cut(
    name: str, query: Tensor, table: FoveatedTable, number: int, width: int
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Return the grid of a kernel whose rows are global tokens and sets, its sizes and its compile-time options."""
    batch, heads, tokens, size = query.shape
    tile = of_rows(tile_for(name, architecture(query.device), size), width)
    parts, copies = -(-width // tile.rows), batch * heads
    blocks = -(-table.num_globals // tile.rows) + number * parts
    sizes = tokens, heads, copies, table.num_globals, number, parts, width
    return (blocks * copies,), sizes, _options(tile, size)


def _options(tile: Tile, size: int) -> dict[str, Any]:
    return {
        "SIZE": size,
        "BLOCK_SIZE": block_size(size),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _table(tensors: list[Tensor], numbers: list[int]) -> FoveatedTable:
    return FoveatedTable(*tensors, *numbers)  # type: ignore[call-arg]


def _seen(table: FoveatedTable, query: Tensor) -> tuple[Tensor, ...]:
    """Return what a kernel reads that owns queries."""
    copies = query.shape[0] * query.shape[1]
    return table.queries, table.keys, *cells_of(table, copies), *means_of(table, copies), table.hidden


def _in_log2(bias: Tensor) -> Tensor:
    return (bias / math.log(2)).contiguous()


def _like_output(tensor: Tensor) -> Tensor:
    batch, heads, tokens, size = tensor.shape
    return torch.empty((batch, tokens, heads, size), dtype=tensor.dtype, device=tensor.device)


def _like_statistics(query: Tensor, places: Tensor) -> Tensor:
    return torch.empty((*query.shape[:2], *places.shape), dtype=torch.float32, device=query.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, tensors, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(*given, *output, *tensors)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    given, tensors = saved[:_NUM_GIVEN], list(saved[_NUM_GIVEN:])
    gradients = torch.ops.linearize.foveated_backward(grad.transpose(1, 2), *given, tensors, ctx.numbers, ctx.scale)
    return *(each.transpose(1, 2) for each in gradients[:5]), gradients[5], [None] * len(tensors), None, None


def _forward_shapes(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like_output(query), _like_statistics(query, rest[5][0])


def _backward_shapes(_: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return *(_like_output(each) for each in tensors[:5]), torch.empty_like(tensors[5])


def _refuse(*_: Any) -> None:
    raise RuntimeError("the gradients of foveated attention cannot be differentiated again")


def _define() -> torch.library.Library | None:
    """Define the operators once per process: the pack may be imported under two names."""
    if hasattr(torch.ops.linearize, "foveated_forward"):
        return None
    library = torch.library.Library("linearize", "FRAGMENT")
    inputs = "Tensor query, Tensor key, Tensor value, Tensor mean_key, Tensor mean_value, Tensor bias"
    table = "Tensor[] tensors, int[] numbers, float scale"
    library.define(f"foveated_forward({inputs}, {table}) -> (Tensor, Tensor)")
    saved = f"Tensor grad, {inputs}, Tensor out, Tensor lse"
    library.define(f"foveated_backward({saved}, {table}) -> ({', '.join(['Tensor'] * 6)})")
    for function in (foveated_forward, foveated_backward):
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
    forward, backward = "linearize::foveated_forward", "linearize::foveated_backward"
    torch.library.register_fake(forward, _forward_shapes, lib=library)
    torch.library.register_fake(backward, _backward_shapes, lib=library)
    torch.library.register_autograd(forward, _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(backward, _refuse, lib=library)
    return library


_library = _define()  # an operator lives as long as its library
