"""Chunked attention in PyTorch: exact inside a chunk of frames and its overlap, linear for the frames outside.

Source: ReHyAt (arXiv 2601.04342). Its printed recurrence counts overlapping frames twice; here a frame is linear for a
chunk exactly when it is not exact for it, and the causal recurrence adds a frame when it leaves the overlap.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .feature_maps import Maps
from .layout import Grid, TokenLayout
from .linear import TORCH, Engine, State, check_layout, dense_for_global_queries, mix, summarise
from .specs import ChunkedSpec


@dataclass(frozen=True, slots=True)
class Chunk:
    """Frames of one chunk: queries are `start` to `stop`, exact keys `first` to `stop`."""

    first: int
    start: int
    stop: int


def chunks_of(frames: int, spec: ChunkedSpec) -> Iterator[Chunk]:
    """Yield the chunks of a clip; the last one may be short."""
    for start in range(0, frames, spec.chunk_frames):
        yield Chunk(max(start - spec.overlap_frames, 0), start, min(start + spec.chunk_frames, frames))


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: ChunkedSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine | None = None,
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
        engine: None is PyTorch.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors.
    """
    check_layout(layout, query, key, value)
    engine = engine or TORCH
    output = dense_for_global_queries(query, key, value, layout, scale)
    shared = [(key[:, :, start:stop], value[:, :, start:stop]) for start, stop in layout.global_ranges]
    for start, grid in layout.grids:
        own = slice(start, start + math.prod(grid))
        others = _state_of_other_grids(key, value, layout, start, maps, scale, engine)
        q, k, v = (tensor[:, :, own] for tensor in (query, key, value))
        result = _one_grid(q, k, v, grid, spec, maps, shared, others, scale, engine)
        output = output.slice_scatter(result, 2, own.start, own.stop)
    return output


def _one_grid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    spec: ChunkedSpec,
    maps: Maps,
    shared: list[tuple[Tensor, Tensor]],
    others: State,
    scale: float | None,
    engine: Engine,
) -> Tensor:
    frames, cells = grid[0], grid[1] * grid[2]
    phi_q, phi_k = maps

    def state(first: int, stop: int) -> State:
        part = slice(first * cells, stop * cells)
        return engine.summarise(key[:, :, part], value[:, :, part], phi_k, scale=scale)

    steps = list(chunks_of(frames, spec))
    after = [others]  # of the frames behind each chunk, from the last chunk on; sums, never differences
    if not spec.causal:
        for step, following in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
            after.append(after[-1] + state(step.stop, following.stop))
    before, counted, results = None, 0, []
    for index, step in enumerate(steps):
        if step.first > counted:
            more = state(counted, step.first)
            before, counted = more if before is None else before + more, step.first
        outside = after[0] if spec.causal else after[len(steps) - 1 - index]
        exact = slice(step.first * cells, step.stop * cells)
        keys = torch.cat([*(k for k, _ in shared), key[:, :, exact]], dim=2)
        values = torch.cat([*(v for _, v in shared), value[:, :, exact]], dim=2)
        queries = query[:, :, step.start * cells : step.stop * cells]
        seen = outside if before is None else outside + before
        results.append(engine.mix(queries, keys, values, seen, phi_q, scale=scale))
    return torch.cat(results, dim=2)


def _state_of_other_grids(
    key: Tensor, value: Tensor, layout: TokenLayout, own: int, maps: Maps, scale: float | None, engine: Engine
) -> State:
    state = engine.summarise(key[:, :, :0], value[:, :, :0], maps[1], scale=scale)
    for start, grid in layout.grids:
        if start != own:
            part = slice(start, start + math.prod(grid))
            state = state + engine.summarise(key[:, :, part], value[:, :, part], maps[1], scale=scale)
    return state


@dataclass(slots=True)
class CausalStream:
    """Causal chunked attention of a clip that arrives chunk by chunk; memory does not grow with the clip.

    Args:
        spec: chunk_frames and overlap_frames; causal.
        maps: phi_q and phi_k of the site.
        cells: tokens per frame.
        scale: factor on q . k; None is 1 / sqrt(D).

    Raises:
        ValueError: the spec is not causal: later frames would have to be known.
    """

    spec: ChunkedSpec
    maps: Maps
    cells: int
    scale: float | None = None
    _state: State | None = field(default=None, init=False)
    _recent: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.spec.causal:
            raise ValueError("a stream needs causal=True, because frames that have not arrived cannot be seen")

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output (B, H, n, D) of the next `chunk_frames` frames (at the end of a clip fewer)."""
        phi_q, phi_k = self.maps
        if self._state is None or self._recent is None:
            self._state = summarise(key[:, :, :0], value[:, :, :0], phi_k, scale=self.scale)
            self._recent = key[:, :, :0], value[:, :, :0]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self._recent, (key, value), strict=True))
        result = mix(query, keys, values, self._state, phi_q, scale=self.scale)
        leaving = max(keys.shape[2] - self.spec.overlap_frames * self.cells, 0)
        self._state = self._state + summarise(keys[:, :, :leaving], values[:, :, :leaving], phi_k, scale=self.scale)
        self._recent = keys[:, :, leaving:].clone(), values[:, :, leaving:].clone()
        return result
