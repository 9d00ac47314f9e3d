"""Where each token of a self-attention call lies: text, grids, references.

A `TokenLayout` names the segments of one call in sequence order. It does not know models, radii or kernels; hosts make
it, everything below reads it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # (frames, height, width) in tokens, row-major, width fastest
Ranges = tuple[tuple[int, int], ...]  # (start, stop) of some tokens each


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something was not done: a stable code for counting and one sentence for people."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive tokens.

    Args:
        role: what the tokens are: "text", "main", "reference", "register", "pad".
        length: number of tokens, at least 0.
        grid: (frames, height, width) of a segment whose tokens attend locally; None makes its tokens global, which
            means that they see, and are seen by, every token.
        place: (frames, height, width) of global tokens that are a picture or a clip of their own, such as a reference;
            kinds that see through means cut it like a grid, others leave it aside.

    Raises:
        ValueError: the length is negative, or is not the product of the grid or the place.
    """

    role: str
    length: int
    grid: Grid | None = None
    place: Grid | None = None

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"a segment holds 0 or more tokens, got {self.role} with length={self.length}")
        for grid in (self.grid, self.place):
            if grid is not None and (min(grid) < 1 or math.prod(grid) != self.length):
                raise ValueError(f"the {self.role} segment has {self.length} tokens, its grid {grid} does not")


def grid_segment(role: str, frames: int, height: int, width: int) -> Segment:
    """Return a local segment with one token per cell of `frames` x `height` x `width`."""
    return Segment(role, frames * height * width, (frames, height, width))


def reference_segment(grid: Grid) -> Segment:
    """Return global tokens that are a picture or a clip of their own, one token per cell of its grid."""
    return Segment("reference", math.prod(grid), place=grid)


@dataclass(frozen=True, slots=True)
class Span:
    """A segment placed in the sequence: its tokens are `start` to `stop` (exclusive)."""

    start: int
    segment: Segment

    @property
    def stop(self) -> int:
        return self.start + self.segment.length


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The segments of one self-attention call, in sequence order.

    Segments follow each other without gap or overlap, so a layout covers its sequence exactly; `mismatch` compares
    that with the tokens that really arrived.

    Args:
        segments: in sequence order; any number of grids and global segments, in any order.
    """

    segments: tuple[Segment, ...]
    spans: tuple[Span, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        spans, start = [], 0
        for segment in self.segments:
            spans.append(Span(start, segment))
            start += segment.length
        object.__setattr__(self, "spans", tuple(spans))

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> "TokenLayout":
        """Return the layout of `segments`, empty ones left out."""
        return cls(tuple(segment for segment in segments if segment.length))

    @property
    def num_tokens(self) -> int:
        """N, the length of the sequence."""
        return sum(segment.length for segment in self.segments)

    @property
    def num_global(self) -> int:
        """Number of tokens that see, and are seen by, every token."""
        return sum(segment.length for segment in self.segments if segment.grid is None)

    @property
    def grids(self) -> tuple[tuple[int, Grid], ...]:
        """(first token, grid) of every local segment, in sequence order."""
        return tuple((span.start, span.segment.grid) for span in self.spans if span.segment.grid is not None)

    @property
    def with_all_grids(self) -> "TokenLayout":
        """The same tokens, those of pictures and clips of their own on grids too."""
        return TokenLayout(tuple(replace(each, grid=each.grid or each.place, place=None) for each in self.segments))

    @property
    def global_ranges(self) -> Ranges:
        """(start, stop) of the global tokens, neighbouring segments joined."""
        spans = (span for span in self.spans if span.segment.grid is None and span.segment.length)
        return join_ranges((span.start, span.stop) for span in spans)

    def grid_tokens(self, device: torch.device) -> Tensor:
        """Return the indices of all tokens that lie on a grid."""
        return token_indices([(start, start + math.prod(grid)) for start, grid in self.grids], device)

    def check(self, *tensors: Tensor) -> None:
        """Raise ValueError where a tensor (B, H, N, D) has another number of tokens."""
        for tensor in tensors:
            mismatch = self.mismatch(tensor.shape[2])
            if mismatch:
                raise ValueError(str(mismatch))

    def mismatch(self, num_tokens: int) -> Reason | None:
        """Return why this layout cannot describe a call of `num_tokens` tokens, or None if it covers it exactly."""
        if num_tokens == self.num_tokens:
            return None
        parts = " + ".join(f"{segment.length} {segment.role}" for segment in self.segments)
        return Reason(
            "layout",
            f"the attention call has {num_tokens} tokens where {parts} = {self.num_tokens} were expected;"
            " another node adds or removes tokens",
        )


def join_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges of tokens in order, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def token_indices(ranges: Iterable[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Return the tokens of some ranges, one range after the other, (n,) int64."""
    parts = [torch.arange(start, stop, device=device) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
