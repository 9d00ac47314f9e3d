"""Foveated attention on Triton kernels: which specs they take, and what they are given.

The choice of tiles, the means and the lists are those of `kinds/foveated.py`; the kernels are in `kernels/foveated.py`.
Nothing here falls back to anything else.
"""

import torch
from torch import Tensor

from ...kernels import FoveatedTable, foveated_attend
from ...kernels.foveated_table import foveated_table
from ..kinds.foveated import table_of
from ..kinds.foveated_cells import CellTable
from ..kinds.foveated_choice import choose_tiles, mean_bias, means_of
from ..kinds.foveated_chunks import lists_of
from ..layout import Reason, TokenLayout
from ..memory import LongLived
from ..specs import FoveatedSpec, SiteSpec, groups_of

CHUNK_MARKS = 2**24  # cells of all levels, times tiles and heads, that are marked at once


def foveated_refusal(spec: SiteSpec, shape: tuple[int, int, int, int]) -> Reason | None:
    """Return why the kernels do not compute a spec, or None if they do: one for all heads, means alone."""
    specs = {group.spec for group in groups_of(spec, shape[1])}
    if len(specs) > 1:
        return Reason("heads", "backend triton runs foveated attention with one spec for all heads of a site")
    if any(isinstance(each, FoveatedSpec) and each.order for each in specs):
        return Reason("order", "backend triton runs foveated attention of order 0, the first-order term runs on torch")
    return None


def foveated_with_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: SiteSpec,
    *,
    scale: float | None = None,
    choice: Tensor | None = None,
    bias: Tensor | None = None,
    pool_logits: Tensor | None = None,
    memory: LongLived | None = None,
) -> Tensor:
    """Return foveated attention, as `foveated_attention` does.

    Shapes:
        query, key, value: (B, H, N, D), any strides. Output: (B, H, N, D), a view of (B, N, H, D).

    Args:
        layout, scale, choice, bias, pool_logits, memory: as in `foveated_attention`.
        spec: a `FoveatedSpec` of order 0, or a split of heads that all have one.

    Raises:
        ValueError: the layout has another number of tokens than the tensors, or these have different shapes.

    Notes:
        Gradients for query, key, value, bias and pool_logits with the choice held fixed; once differentiable.
    """
    layout.check(query, key, value)
    if not key.shape == value.shape == query.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value have one shape, got {shapes}")
    spec = groups_of(spec, query.shape[1])[0].spec
    assert isinstance(spec, FoveatedSpec) and not spec.order
    layout, memory = layout.with_all_grids, memory or LongLived()
    key, value = key.to(query.dtype), value.to(query.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if factor < 0:  # the kernels take the maximum before they scale
        query, factor = -query, -factor
    cells = table_of(layout, spec, query.device, memory)
    means = [means_of(tensor, layout, spec, cells, pool_logits) for tensor in (key, value)]
    if choice is None:
        known = means if spec.levels == 1 and pool_logits is None else ()
        choice = choose_tiles(query, key, value, layout, spec, cells, factor, known)
    mean_key, mean_value = (mean.to(query.dtype) for mean in means)
    biases = mean_bias(cells, bias, torch.float32)
    return foveated_attend(query, key, value, mean_key, mean_value, biases, _table(cells, spec, choice), factor)


def _table(cells: CellTable, spec: FoveatedSpec, choice: Tensor) -> FoveatedTable:
    """Return what the kernels are given: lists of all tiles, made for some at a time."""
    batch, heads, tiles, _ = choice.shape
    step = max(1, CHUNK_MARKS // max(1, batch * heads * len(cells.sizes)))
    exact, means = [], []
    for first in range(0, tiles, step):
        near, seen = lists_of(slice(first, first + step), cells, spec, choice)
        exact.append(near.to(torch.int32))
        if seen is not None:
            means.append(seen.to(torch.int32))
    listed = _joined(means) if means else None
    exact = _joined(exact) if exact else torch.empty(1, 0, 0, dtype=torch.int32, device=choice.device)
    return foveated_table(cells.globals, cells.tiles, cells.cells, exact, listed, len(cells.sizes))


def _joined(parts: list[Tensor]) -> Tensor:
    """Return (b, h, T, K) lists of some tiles each as those of all, (b h, U, K). `parts` is empty afterwards."""
    most, tiles = max(part.shape[-1] for part in parts), sum(part.shape[2] for part in parts)
    joined = parts[0].new_full((*parts[0].shape[:2], tiles, most), -1)
    while parts:
        part = parts.pop()
        joined[:, :, tiles - part.shape[2] : tiles, : part.shape[-1]] = part
        tiles -= part.shape[2]
    return joined.flatten(0, 1)
