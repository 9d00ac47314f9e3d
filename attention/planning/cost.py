"""What attention costs: exact pairs of query and key, FLOPs and bytes, without running anything.

Counts are for the core of attention, without projections and rotary embedding.
"""

import functools
import math
from dataclasses import dataclass

import torch

from ..kinds.chunked import chunks_of, linear_runs
from ..kinds.feature_maps import MAPS
from ..kinds.foveated_cells import cell_table, chosen_tiles
from ..kinds.kind import kind_of
from ..layout import Grid, TokenLayout
from ..specs import (
    ChunkedSpec,
    ClearSpec,
    DenseSpec,
    FoveatedSpec,
    HybridSpec,
    LinearSpec,
    MappedSpec,
    SiteSpec,
    groups_of,
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one forward of one site costs, per item of the batch.

    Args:
        pairs: (query, key) pairs that meet in a softmax, summed over heads.
        flops: floating point operations: 4 * D per pair, what linear keys take (feature maps, state, its reading), and
            2 * D * D per head and grid token where matrices follow.
        moved_bytes: bytes of q, k, v and the output, each touched once: the least that has to move.
    """

    pairs: int
    flops: int
    moved_bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.pairs + other.pairs, self.flops + other.flops, self.moved_bytes + other.moved_bytes)


@functools.lru_cache(maxsize=1024)
def disc_pairs(grid: Grid, radius: int, temporal_radius: int = 0) -> int:
    """Return the number of (query, key) pairs of grid tokens that see each other under CLEAR.

    pairs = sum over offsets (dt, dy, dx) in the disc of (frames - |dt|) (height - |dy|) (width - |dx|).

    Args:
        grid: (frames, height, width) in tokens.
        radius: in tokens, strict.
        temporal_radius: in frames, strict; 0 lets every frame see every frame.

    Source: mask of CLEAR (arXiv 2412.16112); the sum is checked against brute force in the tests.
    """
    frames, height, width = grid
    squared = max(temporal_radius, 1) ** 2
    total = 0
    for dt in range(frames):
        across = (frames - dt) * (1 if dt == 0 else 2)
        # whole numbers: dt^2 r^2 + (dy^2 + dx^2) rt^2 < r^2 rt^2
        left = radius**2 * squared - (dt**2 * radius**2 if temporal_radius else 0)
        if left > 0:
            total += across * _plane_pairs(height, width, (left - 1) // squared)
    return total


def _plane_pairs(height: int, width: int, largest: int) -> int:
    """Return the pairs of cells of one plane whose squared distance is at most `largest`."""
    total = 0
    for dy in range(min(height - 1, math.isqrt(largest)) + 1):
        reach = min(width - 1, math.isqrt(largest - dy * dy))
        row = width + 2 * sum(width - dx for dx in range(1, reach + 1))
        total += (height - dy) * (1 if dy == 0 else 2) * row
    return total


def pooled_tokens(grid: Grid, down_factor: int) -> int:
    """Return the number of pooled tokens of a grid; squares at the border may be partial."""
    if down_factor == 1:
        return 0
    frames, height, width = grid
    return frames * math.ceil(height / down_factor) * math.ceil(width / down_factor)


def clear_pairs(spec: ClearSpec, layout: TokenLayout) -> int:
    """Return the (query, key) pairs of one head under CLEAR.

    Global queries see every token but no pooled one; grid queries see the global tokens, their disc and the pooled
    tokens of their own grid.
    """
    pairs = layout.num_global * layout.num_tokens
    for _, grid in layout.grids:
        tokens = math.prod(grid)
        pairs += tokens * (layout.num_global + pooled_tokens(grid, spec.down_factor))
        pairs += disc_pairs(grid, spec.radius, spec.temporal_radius)
    return pairs


@functools.lru_cache(maxsize=256)
def foveated_pairs(spec: FoveatedSpec, layout: TokenLayout) -> int:
    """Return the (query, key) pairs of one head under foveated attention, exact ones and means.

    Global queries see every token, all queries see the global tokens. What content chooses is counted as tiles of the
    mean size that leave one mean less each; beside larger means each also splits one of every level.
    """
    layout = layout.with_all_grids
    pairs = layout.num_global * layout.num_tokens
    if not layout.grids:
        return pairs
    table = cell_table(layout, spec, torch.device("cpu"))
    queries = (table.tiles >= 0).sum(1)
    near = (table.cells >= 0).sum(1)[table.exact.clamp_min(0)].masked_fill(table.exact < 0, 0).sum(1)
    means = table.standing.clone()
    chosen = torch.minimum(len(queries) - (table.near >= 0).sum(1), torch.tensor(chosen_tiles(spec, len(queries))))
    seen = near + means + chosen * (queries.sum() / len(queries) - 1)
    if spec.levels > 1:
        seen += chosen * 3 * (spec.levels - 2)
    seen = torch.minimum(seen, queries.sum().double())
    return pairs + round(float((queries * (seen + layout.num_global)).sum()))


def dense_pairs(spec: DenseSpec, layout: TokenLayout) -> int:
    """Return the (query, key) pairs of one head of dense attention."""
    return layout.num_tokens**2


def exact_pairs(spec: LinearSpec | HybridSpec, layout: TokenLayout) -> int:
    """Return the (query, key) pairs of one head that meet in a softmax; the others go through feature maps."""
    on_grids = layout.num_tokens - layout.num_global
    return layout.num_global * layout.num_tokens + on_grids * (layout.num_global + _anchors(spec, layout))


def linear_flops(spec: LinearSpec | HybridSpec, layout: TokenLayout, head_dim: int) -> int:
    """Return the FLOPs of one head that feature maps take, and the state S, z: building it, and reading it.

    Every query on a grid that has a linear key goes through phi_q and reads a state; every key on a grid that is linear
    for some query goes through phi_k and into a state, once. Sums of states are not counted: they do not grow with the
    tokens.
    """
    queries = layout.num_tokens - layout.num_global
    keys = queries - _anchors(spec, layout)
    return (queries + keys) * _token_flops(spec, head_dim) if keys else 0


def _anchors(spec: LinearSpec | HybridSpec, layout: TokenLayout) -> int:
    """Return the tokens on grids that are exact keys for every query."""
    return 0 if spec.rate is None else sum(math.ceil(math.prod(grid) / spec.rate) for _, grid in layout.grids)


def _token_flops(spec: MappedSpec, head_dim: int) -> int:
    kind = MAPS[spec.feature_map]
    per_map = 2 * kind.num_products(head_dim, spec.feature_dim)
    per_state = 2 * kind.features(head_dim, spec.feature_dim) * (head_dim + 1)
    return per_map + per_state


def chunked_pairs(spec: ChunkedSpec, layout: TokenLayout) -> int:
    """Return what `exact_pairs` does, of chunked attention."""
    pairs = layout.num_global * layout.num_tokens
    for _, (frames, height, width) in layout.grids:
        steps = chunks_of(frames, spec)
        pairs += frames * height * width * layout.num_global
        pairs += sum((step.stop - step.start) * (step.stop - step.first) for step in steps) * (height * width) ** 2
    return pairs


def chunked_flops(spec: ChunkedSpec, layout: TokenLayout, head_dim: int) -> int:
    """Return what `linear_flops` does, of chunked attention."""
    return _outside_chunks(spec, layout) * _token_flops(spec, head_dim)


def _outside_chunks(spec: ChunkedSpec, layout: TokenLayout) -> int:
    """Return the queries on grids that have linear keys, and the keys on grids that are linear for some query."""
    if len(layout.grids) > 1:
        return 2 * (layout.num_tokens - layout.num_global)
    tokens = 0
    for _, (frames, height, width) in layout.grids:
        steps = tuple(chunks_of(frames, spec))
        queries = sum(step.stop - step.start for step in steps if step.has_linear)
        keys = sum(stop - first for first, stop in linear_runs(frames, steps, False))
        tokens += (queries + keys) * height * width
    return tokens


def attention_cost(
    spec: SiteSpec,
    layout: TokenLayout,
    num_heads: int,
    head_dim: int,
    bytes_per_value: int = 2,
    *,
    has_matrices: bool = False,
) -> Cost:
    """Return the cost of one site.

    Args:
        spec: what the site runs.
        layout: the tokens of the call.
        num_heads, head_dim: H and D.
        bytes_per_value: of q, k, v and output; 2 for fp16 and bf16.
        has_matrices: a matrix per head follows the attention, see `output_map.py`.

    Raises:
        ValueError: a split that names another number of heads.
    """
    pairs, others = 0, 0
    for group in groups_of(spec, num_heads):
        kind = kind_of(group.spec)
        pairs += len(group.heads) * kind.pairs(group.spec, layout)
        others += len(group.heads) * kind.flops(group.spec, layout, head_dim)
    if has_matrices:
        others += 2 * (layout.num_tokens - layout.num_global) * num_heads * head_dim**2
    moved = 4 * layout.num_tokens * num_heads * head_dim * bytes_per_value
    return Cost(pairs, 4 * head_dim * pairs + others, moved)
