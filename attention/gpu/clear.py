"""CLEAR on Triton kernels: when they can run, what they are given, and a test of them before their first use.

The tables come from `clear_blocks.py`, the mathematics are in `kernels/`. Nothing here falls back to anything else.
"""

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels import Table, Tile, architecture, attend, capability, tuning
from ..kinds.clear import append_pooled
from ..kinds.reference import reference_attention
from ..layout import Reason, Segment, TokenLayout, grid_segment
from ..memory import LongLived
from ..specs import ClearSpec, SiteSpec, groups_of, radius_per_head
from .clear_blocks import Disc, Ranges, key_table, query_table

log = logging.getLogger("linearize")

# relative error against float64 beyond which a kernel is wrong rather than rounded
SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Tested = tuple[torch.device, torch.dtype, int, bool]
_tested: dict[Tested, Reason | None] = {}
_lock = threading.Lock()


def clear_refusal(spec: SiteSpec, shape: tuple[int, int, int, int]) -> Reason | None:
    """Return why the kernels do not compute a spec of CLEAR, or None if they do: heads may differ in radius only."""
    specs = {group.spec for group in groups_of(spec, shape[1])}
    if len({(each.down_factor, each.proportional) for each in specs if isinstance(each, ClearSpec)}) > 1:
        return Reason("heads", "backend triton needs the same down_factor and proportional for all heads of a site")
    return None


def device_refusal(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Reason | None:
    """Return why the kernels cannot run on a device, or None; their first use there is preceded by a test of them."""
    refusal = capability.refusal(device, dtype, head_dim)
    return Reason(*refusal) if refusal else _self_test_result((device, dtype, head_dim, needs_grad))


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
    for tensor in (query, key, value):
        mismatch = layout.mismatch(tensor.shape[2])
        if mismatch:
            raise ValueError(str(mismatch))
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


def _self_test_result(case: Tested) -> Reason | None:
    return tested_once(case, _tested, _self_test)


def tested_once(
    case: Tested, tested: dict[Tested, Reason | None], test: Callable[[Tested], Reason | None]
) -> Reason | None:
    """Return why kernels failed their test, or None; the test runs once per process."""
    with _lock:
        if case not in tested:
            try:
                tested[case] = test(case)
            except torch.OutOfMemoryError:  # says nothing of the kernels, so the next call tries again
                return Reason("memory", "backend triton had no memory left to test itself")
            if tested[case] is not None:
                log.warning("Linearize: %s; other backends are used", tested[case])
        return tested[case]


def _self_test(case: Tested) -> Reason | None:
    return judge(case, lambda: self_test_error(*case), tuning.KERNELS)


def judge(case: Tested, measure: Callable[[], float], kernels: tuple[str, ...]) -> Reason | None:
    """Return why a test of kernels failed, or None; where a tile of theirs does not fit, the safe one is tried."""
    device, dtype, head_dim, _ = case
    try:
        try:
            found = measure()
        except Exception as error:
            # by name, because Triton is imported in kernels/ only
            too_large = type(error).__name__ == "OutOfResources"
            if not too_large or not tuning.reduce_tiles(architecture(device), head_dim, kernels):
                raise
            found = measure()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler or driver may throw anything
        first = next(iter(str(error).strip().splitlines()), "")
        return Reason("triton", f"backend triton failed its self-test: {type(error).__name__}: {first}"[:240])
    if found <= SELF_TEST_TOLERANCE[dtype]:
        return None
    return Reason("triton", f"backend triton failed its self-test: its results are wrong by {found:.1%}")


def self_test_error(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> float:
    """Return the largest relative error of the kernels against the reference on a small picture.

    The picture has all that a table can hold: two radii, text, steps without and with masks. To prove that keys outside
    the windows are not even read, the last value is then made NaN: the first row of the picture must not notice. If it
    does, the error is infinite.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(needs_grad), torch.autocast(device.type, enabled=False):
        layout, spec = self_test_case(tuning.tile_for("forward", architecture(device), head_dim))
        generator, shape = torch.Generator("cpu").manual_seed(0), (1, 2, layout.num_tokens, head_dim)
        inputs = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(4)]
        *leaves, grad = [tensor.requires_grad_(needs_grad) for tensor in inputs]
        query, key, value = leaves
        memory = LongLived()
        output = clear_with_triton(query, key, value, layout, spec, memory=memory)
        truth = reference_attention(query, key, value, layout, spec)
        pairs = [(output, truth)]
        if needs_grad:
            pairs += zip(
                torch.autograd.grad(output, leaves, grad.detach()),
                torch.autograd.grad(truth, leaves, grad.detach().double()),
                strict=True,
            )
        with torch.no_grad():
            poisoned = value.clone()
            poisoned[:, :, -1] = float("nan")
            start, (_, _, width) = layout.grids[0]
            row = slice(start, start + width)
            far = clear_with_triton(query, key, poisoned, layout, spec, memory=memory)
            if not torch.equal(far[:, :, row], output[:, :, row]):
                return float("inf")
            return max(float((mine.double() - true).norm() / true.norm()) for mine, true in pairs)


def self_test_case(tile: Tile) -> tuple[TokenLayout, SiteSpec]:
    """Return the layout and spec of the self-test for a tile: big enough for a step that all of its queries see."""
    radius, side = {128: (18, 40), 64: (13, 26), 32: (10, 20), 16: (7, 14)}[tile.rows]
    layout = TokenLayout.of((Segment("text", tile.columns + 5), grid_segment("main", 1, side, side)))
    return layout, radius_per_head((radius, 3))
