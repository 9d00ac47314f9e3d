"""Tests of the kernels against the reference, before their first use on a device; and what they refuse without one.

A test runs once per process for each device, dtype and head size, with and without gradients.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import Tile, architecture, capability, tuning
from ..kinds.feature_maps import MAPS
from ..kinds.foveated import tiles_of
from ..kinds.foveated_reference import foveated_reference
from ..kinds.mapped import mapped_attention
from ..kinds.reference import reference_attention
from ..layout import Reason, Segment, TokenLayout, grid_segment
from ..memory import LongLived
from ..specs import FoveatedSpec, HybridSpec, LinearSpec, SiteSpec, radius_per_head
from .clear import clear_with_triton
from .foveated import foveated_with_triton
from .mapped import TRITON

log = logging.getLogger("linearize")

# relative error against float64 beyond which a kernel is wrong rather than rounded
NO_COMPILER = "Failed to find C compiler"  # in the words of Triton
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Case:
    """What kernels are tested on: the device and dtype of the query, D, and whether gradients are asked for."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False


@dataclass(slots=True)
class SelfTest:
    """The test of one family of kernels.

    Args:
        kernels: their names in `tuning.py`.
        measure: returns the largest relative error of a case.
        results: of the cases that were tested: None, or why these kernels are not used.
    """

    kernels: tuple[str, ...]
    measure: Callable[[Case], float]
    results: dict[Case, Reason | None] = field(default_factory=dict)

    def refusal(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False
    ) -> Reason | None:
        """Return why the kernels cannot run on a device, or None; tests them where nobody did."""
        case = Case(device, dtype, head_dim, needs_grad)
        refusal = capability.refusal(case.device, case.dtype, case.head_dim)
        if refusal:
            return Reason(*refusal)
        with _lock:
            if case not in self.results:
                try:
                    self.results[case] = self.run(case)
                except torch.OutOfMemoryError:  # says nothing of the kernels, so the next call tries again
                    return Reason("memory", "backend triton had no memory left to test itself")
                if self.results[case] is not None:
                    log.warning("Linearize: %s; other backends are used", self.results[case])
            return self.results[case]

    def run(self, case: Case) -> Reason | None:
        """Return why the test failed, or None; where tiles do not fit the device, smaller ones are tried."""
        try:
            error = self._fitting_error(case)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a compiler or driver may throw anything
            if NO_COMPILER in str(failure):
                return Reason(
                    "compiler", "backend triton needs a C compiler to start its kernels: install gcc or clang"
                )
            first = next(iter(str(failure).strip().splitlines()), "")
            return Reason("triton", f"backend triton failed its self-test: {type(failure).__name__}: {first}"[:240])
        if error <= TOLERANCE[case.dtype]:
            return None
        return Reason("triton", f"backend triton failed its self-test: its results are wrong by {error:.1%}")

    def _fitting_error(self, case: Case) -> float:
        while True:
            try:
                return self.measure(case)
            except Exception as failure:
                # by name, because Triton is imported in kernels/ only
                too_large = type(failure).__name__ == "OutOfResources"
                if not too_large or not tuning.reduce_tiles(architecture(case.device), case.head_dim, self.kernels):
                    raise


def clear_error(case: Case) -> float:
    """Return the largest relative error of CLEAR's kernels on a small picture, outputs and gradients.

    The picture has all that a table can hold: two radii, text, steps without and with masks. To prove that keys outside
    the windows are not even read, the last value is then made NaN: the first row of the picture must not notice. If it
    does, the error is infinite.
    """
    with _modes(case):
        layout, spec = clear_case(tuning.tile_for("forward", architecture(case.device), case.head_dim))
        leaves, grad = _inputs(case, layout, torch.Generator("cpu").manual_seed(0))
        query, key, value = leaves
        memory = LongLived()
        output = clear_with_triton(query, key, value, layout, spec, memory=memory)
        error = _error(output, reference_attention(query, key, value, layout, spec), leaves, grad)
        with torch.no_grad():
            poisoned = value.clone()
            poisoned[:, :, -1] = float("nan")
            start, (_, _, width) = layout.grids[0]
            row = slice(start, start + width)
            far = clear_with_triton(query, key, poisoned, layout, spec, memory=memory)
            return error if torch.equal(far[:, :, row], output[:, :, row]) else float("inf")


def clear_case(tile: Tile) -> tuple[TokenLayout, SiteSpec]:
    """Return the picture and the spec for a tile: big enough for a step that all of its queries see."""
    radius, side = {128: (18, 40), 64: (13, 26), 32: (10, 20), 16: (7, 14)}[tile.rows]
    layout = TokenLayout.of((Segment("text", tile.columns + 5), grid_segment("main", 1, side, side)))
    return layout, radius_per_head((radius, 3))


def mapped_error(case: Case) -> float:
    """Return the largest relative error of the kernels with feature maps on a small clip, outputs and gradients.

    The clip has more tokens and more exact keys than the kernels take at once, no multiple of either. Features are
    given, or their logs, or computed in the kernels; there are calls with exact keys, one without and one with the
    vendor's.
    """
    layout = TokenLayout.of((grid_segment("main", 3, 7, 9), Segment("text", 5)))
    alone = TokenLayout.of((grid_segment("main", 3, 7, 9),))
    calls = [(layout, HybridSpec(2), "hedgehog"), (layout, HybridSpec(3, stabilizer="lse"), "hedgehog"),
             (layout, HybridSpec(2), "favor"), (alone, LinearSpec(), "elu1")]  # fmt: skip
    with _modes(case):
        return max(_mapped_error(case, *each) for each in calls)


def _mapped_error(case: Case, layout: TokenLayout, spec: LinearSpec | HybridSpec, name: str) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    maps = MAPS[name](2, case.head_dim), MAPS[name](2, case.head_dim)
    for each in maps:
        each.reset(generator)
        each.to(case.device)
    leaves, grad = _inputs(case, layout, generator)
    query, key, value = leaves
    output = mapped_attention(query, key, value, layout, spec, maps, engine=TRITON)
    return _error(output, reference_attention(query, key, value, layout, spec, maps=maps), leaves, grad)


def foveated_error(case: Case) -> float:
    """Return the largest relative error of foveated attention's kernels on small pictures, outputs and gradients.

    They have text, whole tiles and ragged ones, of 64 and of 16 queries, means that all tiles share, and means of
    several levels that each tile lists.
    """
    large = FoveatedSpec(radius=1, top=0.2, tile=8), 20, 19
    small = FoveatedSpec(radius=1, top=0.2, tile=4, levels=2), 13, 12
    with _modes(case):
        return max(_foveated_error(case, *each) for each in (large, small))


def _foveated_error(case: Case, spec: FoveatedSpec, rows: int, columns: int) -> float:
    layout = TokenLayout.of((Segment("text", 37), grid_segment("main", 1, rows, columns)))
    leaves, grad = _inputs(case, layout, torch.Generator("cpu").manual_seed(0))
    query, key, value = leaves
    choice = tiles_of(query, key, value, layout, spec)
    output = foveated_with_triton(query, key, value, layout, spec, choice=choice)
    return _error(output, foveated_reference(query, key, value, layout, spec, None, choice), leaves, grad)


@contextlib.contextmanager
def _modes(case: Case) -> Iterator[None]:
    """Leave whatever modes the caller is in."""
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(case.needs_grad),
        torch.autocast(case.device.type, enabled=False),
    ):
        yield


def _inputs(case: Case, layout: TokenLayout, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value, (1, 2, N, D), and a gradient of the output."""
    shape = (1, 2, layout.num_tokens, case.head_dim)
    inputs = [torch.randn(shape, generator=generator, device="cpu").to(case.device, case.dtype) for _ in range(4)]
    *leaves, grad = [tensor.requires_grad_(case.needs_grad) for tensor in inputs]
    return leaves, grad


def _error(output: Tensor, truth: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> float:
    """Return the largest relative error of an output and, where there are gradients, of those of the leaves."""
    pairs = [(output, truth)]
    if output.requires_grad:
        pairs += zip(
            torch.autograd.grad(output, leaves, grad.detach()),
            torch.autograd.grad(truth, leaves, grad.detach().double()),
            strict=True,
        )
    with torch.no_grad():
        return max(float((mine.double() - true).norm() / true.norm()) for mine, true in pairs)


CLEAR = SelfTest(tuning.KERNELS, clear_error)
FOVEATED = SelfTest(tuning.FOVEATED_KERNELS, foveated_error)
MAPPED = SelfTest(tuning.MAPPED_KERNELS, mapped_error)
