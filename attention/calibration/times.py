"""Seconds of attention at a size, measured on made-up tokens: what Budget Plan counts beside operations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..kinds.kind import Learned
from ..kinds.output_map import map_outputs
from ..layout import TokenLayout
from ..memory import LongLived
from ..planning.report import describe_spec
from ..runtime.backends import CallShape, choose_backend
from ..runtime.decisions import why_failed
from ..specs import SiteSpec
from ..students.learned import new_maps
from .measures import NANOSECOND
from .watch import call_seconds

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Milliseconds:
    """Counts time, in nanoseconds, of one item of a batch; what was measured once is kept.

    Args:
        dense: attention as the user runs it, for (1, H, N, D).
        dtype, device: of the model's computation.
        stop: raises where the user cancelled.
    """

    words = "attention's time"
    dense: Dense
    dtype: torch.dtype
    device: torch.device
    stop: Callable[[], None]
    _known: dict[tuple[SiteSpec, TokenLayout, int, int, bool], int] = field(default_factory=dict)

    def cost(self, spec: SiteSpec, layout: TokenLayout, num_heads: int, head_dim: int, *, has_matrices: bool) -> int:
        """Return the nanoseconds of one forward of a site.

        Raises:
            ValueError: it cannot run here.
        """
        key = (spec, layout, num_heads, head_dim, has_matrices)
        if key not in self._known:
            self.stop()
            self._known[key] = max(1, round(self._seconds(*key) / NANOSECOND))
        return self._known[key]

    def _seconds(self, spec: SiteSpec, layout: TokenLayout, num_heads: int, head_dim: int, has_matrices: bool) -> float:
        shape = (1, num_heads, layout.num_tokens, head_dim)
        query, key, value = (torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(3))
        if spec.is_dense:
            return call_seconds(self.device, partial(self.dense, query, key, value))
        backend, reasons = choose_backend(CallShape(spec, layout, shape, self.dtype, self.device))
        if backend is None:
            raise ValueError(f"{describe_spec(spec)} cannot be timed: {'; '.join(map(str, reasons))}")
        learned, memory = Learned(maps=self._maps(spec, num_heads, head_dim)), LongLived()
        matrices = torch.eye(head_dim).expand(num_heads, head_dim, head_dim) if has_matrices else None
        facts = CallShape(spec, layout, shape, self.dtype, self.device)

        def run() -> Tensor:
            output = backend.run(query, key, value, facts, scale=None, learned=learned, memory=memory)
            return output if matrices is None else map_outputs(output, layout, matrices)

        try:
            return call_seconds(self.device, run)
        except Exception as error:
            raise ValueError(
                f"{describe_spec(spec)} cannot be timed: {why_failed(backend.name, error).text}"
            ) from error

    def _maps(self, spec: SiteSpec, num_heads: int, head_dim: int):  # noqa: ANN202
        if not spec.has_maps:
            return None
        phi_q, phi_k = new_maps(spec, num_heads, head_dim)
        return phi_q.to(self.device), phi_k.to(self.device)
