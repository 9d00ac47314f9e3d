"""CLEAR on Triton kernels: which specs they take, and what they are given.

The tables come from `clear_blocks.py`, the kernels are in `kernels/clear.py`. Nothing here falls back to anything else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import Table, architecture, attend, tuning
from ..kinds.clear import append_pooled
from ..layout import Ranges, Reason, TokenLayout
from ..memory import LongLived
from ..specs import ClearSpec, SiteSpec, groups_of
from .clear_blocks import Disc, key_table, query_table


def clear_refusal(spec: SiteSpec, shape: tuple[int, int, int, int]) -> Reason | None:
    """Return why the kernels do not compute a spec of CLEAR, or None if they do: heads may differ in radius only."""
    specs = {group.spec for group in groups_of(spec, shape[1])}
    if len({(each.down_factor, each.proportional) for each in specs if isinstance(each, ClearSpec)}) > 1:
        return Reason("heads", "backend triton needs the same down_factor and proportional for all heads of a site")
    return None


def clear_with_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: SiteSpec,
    *,
    scale: float | None = None,
    pool_weight: Tensor | None = None,
    memory: LongLived | None = None,
) -> Tensor:
    """Return CLEAR attention, as `clear_attention` does, with a radius per head.

    Shapes:
        query, key, value: (B, H, N, D), any strides. Output: (B, H, N, D), a view of (B, N, H, D).

    Args:
        layout, scale, pool_weight, memory: as in `clear_attention`.
        spec: a `ClearSpec`, or a split of heads whose groups are some and differ in their radii only.

    Raises:
        ValueError: the layout has another number of tokens than the tensors, or these have different shapes.

    Notes:
        Gradients for query, key, value and pool_weight; once differentiable.
    """
    layout.check(query, key, value)
    if not key.shape == value.shape == query.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value have one shape, got {shapes}")
    groups = groups_of(spec, query.shape[1])
    shared, discs = groups[0].spec, [(0, 0)] * query.shape[1]
    assert isinstance(shared, ClearSpec)
    for group in groups:
        assert isinstance(group.spec, ClearSpec)
        for head in group.heads:
            discs[head] = (group.spec.radius, group.spec.temporal_radius)
    if scale is None:
        scale = shared.scale(query.shape[-1], layout.num_tokens)
    if scale < 0:  # the kernels take the maximum before they scale
        query, scale = -query, -scale
    key, value, pooled = key.to(query.dtype), value.to(query.dtype), ()
    if shared.down_factor > 1:
        key, value, ranges = append_pooled(key, value, layout, shared.down_factor, pool_weight)
        pooled = tuple(ranges)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    tables = _tables(layout, tuple(discs), pooled, query, needs_grad, memory or LongLived())
    return attend(query, key, value, tables, scale)


def _tables(
    layout: TokenLayout,
    discs: tuple[Disc, ...],
    pooled: Ranges,
    query: Tensor,
    needs_grad: bool,
    memory: LongLived,
) -> Sequence[Table]:
    """Return the table of the forward pass, with gradients also those of queries and of keys."""

    def kept(kernel: str) -> Table:
        tile = tuning.tile_for(kernel, architecture(query.device), query.shape[-1])
        # without pooled keys both tables of equal tiles are the same, for who sees is seen
        make = key_table if kernel == "dk_dv" and pooled else query_table

        def build() -> Table:
            with torch.inference_mode(False):  # or a later backward pass could not save them
                return make(layout, discs, pooled, tile, query.device)

        return memory.get(("clear blocks", make.__name__, layout, discs, pooled, tile, query.device), build, _size)

    return [kept(kernel) for kernel in (tuning.KERNELS if needs_grad else tuning.KERNELS[:1])]


def _size(table: Table) -> int:
    return table.num_bytes
