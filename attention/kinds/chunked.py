"""Chunked attention in PyTorch: exact inside a chunk of frames and its overlap, linear for the frames outside.

Source: ReHyAt (arXiv 2601.04342). Its printed recurrence counts overlapping frames twice; here a frame is linear for a
chunk exactly when it is not exact for it, and the causal recurrence adds a frame when it leaves the overlap.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Grid, TokenLayout
from ..specs import ChunkedSpec
from .feature_maps import FeatureMap, Maps
from .linear import TORCH, Engine, State, dense_for_global_queries, summarise


@dataclass(frozen=True, slots=True)
class Chunk:
    """Frames of one chunk: queries are `start` to `stop`, exact keys `first` to `stop`, linear ones the rest.

    Args:
        after: frames behind the chunk that it sees.
    """

    first: int
    start: int
    stop: int
    after: int

    @property
    def has_linear(self) -> bool:
        """Whether a frame of its own grid is linear for it."""
        return self.first + self.after > 0


def chunks_of(frames: int, spec: ChunkedSpec) -> Iterator[Chunk]:
    """Yield the chunks of a clip; the last one may be short."""
    for start in range(0, frames, spec.chunk_frames):
        stop = min(start + spec.chunk_frames, frames)
        yield Chunk(max(start - spec.overlap_frames, 0), start, stop, 0 if spec.causal else frames - stop)


def linear_runs(frames: int, steps: Sequence[Chunk], for_others: bool) -> list[tuple[int, int]]:
    """Return runs of frames, (first, stop), that are linear for some chunk, or for other grids; none overlap.

    They are cut where a chunk's exact keys begin or end, so that every chunk sees a run as a whole or not at all.
    """
    cuts = sorted({0, frames, *(step.first for step in steps), *(step.stop for step in steps)})
    return [
        (first, stop)
        for first, stop in zip(cuts, cuts[1:], strict=False)
        if for_others or stop <= steps[-1].first or (first >= steps[0].stop and steps[0].after)
    ]


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: ChunkedSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine = TORCH,
) -> Tensor:
    """Return chunked attention of each grid.

    Queries of a chunk see, exactly, the global tokens and the frames of the chunk and of its overlap before it;
    through the feature maps the other frames (with `causal` only the earlier ones) and the tokens of other grids.
    Global queries see everything exactly. A grid of one frame is one chunk, which is dense attention.

    Shapes:
        query, key, value: (B, H, N, D), any strides, N = layout.num_tokens. Output: (B, H, N, D), contiguous.

    Args:
        spec: chunk_frames, overlap_frames, causal.
        maps: phi_q and phi_k of the site.
        scale: factor on q . k; None is 1 / sqrt(D).
        engine: computes states, and what queries make of them.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors.
    """
    layout.check(query, key, value)
    phi_k = maps[1]
    output = dense_for_global_queries(query, key, value, layout, scale)
    shared = layout.global_ranges
    states = [_Runs.of(key, value, start, grid, spec, phi_k, len(layout.grids) > 1, scale, engine)
              for start, grid in layout.grids]  # fmt: skip
    for number, (start, grid) in enumerate(layout.grids):
        others = [state for other in states[:number] + states[number + 1 :] for state in other.states]
        seen, cells, results = reduce(add, others) if others else None, grid[1] * grid[2], []
        for step, outside in zip(states[number].steps, states[number].outside(), strict=True):
            exact = (*shared, (start + step.first * cells, start + step.stop * cells))
            keys, values = (torch.cat([t[:, :, first:stop] for first, stop in exact], dim=2) for t in (key, value))
            queries = query[:, :, start + step.start * cells : start + step.stop * cells]
            state = _sum(seen, outside)
            results.append(_mix(queries, keys, values, state, maps, scale, engine))
        output = output.slice_scatter(torch.cat(results, dim=2), 2, start, start + math.prod(grid))
    return output


@dataclass(frozen=True, slots=True)
class _Runs:
    """The states of a grid's runs of frames, each made once; see `linear_runs`."""

    steps: tuple[Chunk, ...]
    runs: list[tuple[int, int]]
    states: list[State]

    @classmethod
    def of(
        cls, key: Tensor, value: Tensor, start: int, grid: Grid, spec: ChunkedSpec, phi_k: FeatureMap,
        for_others: bool, scale: float | None, engine: Engine,
    ) -> "_Runs":  # fmt: skip
        steps, cells = tuple(chunks_of(grid[0], spec)), grid[1] * grid[2]
        runs = linear_runs(grid[0], steps, for_others)
        parts = [slice(start + first * cells, start + stop * cells) for first, stop in runs]
        return cls(steps, runs, [engine.summarise(key[:, :, p], value[:, :, p], phi_k, scale=scale) for p in parts])

    def outside(self) -> Iterator[State | None]:
        """Yield, for each chunk, the state of the frames of this grid that are linear for it; None where none are."""
        pairs = list(zip(self.runs, self.states, strict=True))
        # sums from either end, never differences
        after: list[State | None] = [None]
        for step, following in zip(reversed(self.steps[:-1]), reversed(self.steps[1:]), strict=True):
            here = [state for (first, stop), state in pairs if step.stop <= first and stop <= following.stop]
            after.append(reduce(_sum, here, after[-1]))
        before, counted = None, 0
        for step in self.steps:
            here = [state for (first, stop), state in pairs if counted <= first and stop <= step.first]
            before, counted, behind = reduce(_sum, here, before), step.first, after.pop()
            yield _sum(before, behind if step.after else None)


def _sum(one: State | None, other: State | None) -> State | None:
    return one if other is None else other if one is None else one + other


def _mix(
    query: Tensor, key: Tensor, value: Tensor, state: State | None, maps: Maps, scale: float | None, engine: Engine
) -> Tensor:
    if state is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    return engine.mix(query, key, value, state, maps[0], scale=scale)


@dataclass(slots=True)
class CausalStream:
    """Causal chunked attention of a clip that arrives chunk by chunk; memory does not grow with the clip.

    Args:
        spec: chunk_frames and overlap_frames; causal.
        maps: phi_q and phi_k of the site.
        cells: tokens per frame.
        scale: factor on q . k; None is 1 / sqrt(D).

    Raises:
        ValueError: the spec is not causal: later frames would have to be known; or a frame has no token.
    """

    spec: ChunkedSpec
    maps: Maps
    cells: int
    scale: float | None = None
    _state: State | None = field(default=None, init=False)
    _recent: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _is_over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.spec.causal:
            raise ValueError("a stream needs causal=True, because frames that have not arrived cannot be seen")
        if type(self.cells) is not int or self.cells < 1:
            raise ValueError(f"a frame has a whole number of tokens, at least 1, got cells={self.cells!r}")

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output (B, H, n, D) of the next `chunk_frames` frames (at the end of a clip fewer).

        Raises:
            ValueError: the step cannot be taken: the tensors differ from each other or from those of the steps before,
                they hold no whole frames or more than a chunk, or the clip ended with a short chunk. The stream is as
                it was.
        """
        self._check(query, key, value)
        recent = self._recent or (key[:, :, :0], value[:, :, :0])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(recent, (key, value), strict=True))
        result = _mix(query, keys, values, self._state, self.maps, self.scale, TORCH)
        leaving = max(keys.shape[2] - self.spec.overlap_frames * self.cells, 0)
        if leaving:
            left = summarise(keys[:, :, :leaving], values[:, :, :leaving], self.maps[1], scale=self.scale)
            self._state = _sum(self._state, left)
        self._recent = keys[:, :, leaving:].clone(), values[:, :, leaving:].clone()
        self._is_over = query.shape[2] < self.spec.chunk_frames * self.cells
        return result

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self._is_over:
            raise ValueError("the clip ended with a chunk that was short; a new clip needs a new stream")
        if query.ndim != 4 or not query.shape == key.shape == value.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
            raise ValueError(f"query, key and value of a step have one shape (B, H, n, D), got {shapes}")
        sorts = {(tensor.dtype, tensor.device) for tensor in (query, key, value)}
        if len(sorts) > 1 or not query.is_floating_point():
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in sorts))
            raise ValueError(f"query, key and value of a step are floating point numbers of one dtype on one device, "
                             f"got {found}")  # fmt: skip
        batch, heads, tokens, size = query.shape
        frames = tokens // self.cells
        if tokens % self.cells or not 1 <= frames <= self.spec.chunk_frames:
            raise ValueError(
                f"a step holds 1 to {self.spec.chunk_frames} whole frames of {self.cells} tokens, got {tokens} tokens"
            )
        for each in self.maps:
            if (each.heads, each.head_dim) != (heads, size):
                raise ValueError(
                    f"the feature maps are for {each.heads} heads of {each.head_dim}, the step has {heads} of {size}"
                )
        if self._recent is None:
            return
        before = self._recent[0]
        if (before.shape[0], before.dtype, before.device) != (batch, query.dtype, query.device):
            raise ValueError(
                f"the steps of a clip are alike: there were {before.shape[0]} clips in {before.dtype} on"
                f" {before.device}, now {batch} in {query.dtype} on {query.device}"
            )
