"""The float64 oracle: every kind as dense attention under an explicit boolean mask.

Slow and memory-hungry on purpose, so that it can be read and believed. Tests compare everything else with it; it
shares no code with the implementations it judges.
"""

import torch
from torch import Tensor

from ..layout import Grid, TokenLayout
from ..specs import ChunkedSpec, ClearSpec, DenseSpec, MappedSpec, SiteSpec, groups_of
from .feature_maps import Maps
from .kind import Learned, kind_of

MAX_TOKENS = 4608  # a mask and scores of this size take about 350 MB per head


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: SiteSpec,
    *,
    scale: float | None = None,
    pool_weight: Tensor | None = None,
    maps: Maps | None = None,
    bias: Tensor | None = None,
    pool_logits: Tensor | None = None,
) -> Tensor:
    """Return the attention that `spec` describes, computed in float64 over explicit masks.

    Shapes:
        query, key, value: (B, H, N, D) with N = layout.num_tokens. Output: (B, H, N, D), float64.

    Args:
        scale: factor on q . k; None takes the spec's own.
        pool_weight: (d, d) weights of pooled tokens; None means 1 / d^2.
        maps: phi_q and phi_k of the site, for kinds that have them.
        bias, pool_logits: of the means of `foveated`, all heads of the site.
    """
    query, key, value = (tensor.double() for tensor in (query, key, value))
    output, learned = torch.empty_like(query), Learned(pool_weight, maps, bias=bias, pool_logits=pool_logits)
    for group in groups_of(spec, query.shape[1]):
        heads = list(group.heads)
        assert not group.spec.has_maps or (maps is not None and len(heads) == query.shape[1]), "maps are of all heads"
        parts = (query[:, heads], key[:, heads], value[:, heads])
        own = learned if heads == list(range(query.shape[1])) else learned.of_group(group)
        output[:, heads] = kind_of(group.spec).reference(*parts, layout, group.spec, own, scale)
    return output


def dense_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: DenseSpec,
    learned: Learned,
    scale: float | None,
) -> Tensor:
    """Return dense attention."""
    mask = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    return _masked_softmax(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)


def clear_mask(layout: TokenLayout, spec: ClearSpec) -> Tensor:
    """Return the (N, N) boolean mask of CLEAR, True where the query (row) sees the key (column)."""
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for start, stop in layout.global_ranges:
        mask[start:stop, :] = True
        mask[:, start:stop] = True
    for start, grid in layout.grids:
        t, y, x = _coordinates(grid)
        dt, dy, dx = (c[:, None] - c[None, :] for c in (t, y, x))
        distance = dy**2 + dx**2
        if spec.temporal_radius:
            distance = distance + (dt * (spec.radius / spec.temporal_radius)) ** 2
        stop = start + len(t)
        mask[start:stop, start:stop] = distance < float(spec.radius) ** 2
    return mask


def clear_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: ClearSpec,
    learned: Learned,
    scale: float | None,
) -> Tensor:
    """Return CLEAR attention."""
    mask = clear_mask(layout, spec)
    if spec.down_factor > 1:
        keys, values, masks = [key], [value], [mask]
        for start, grid in layout.grids:
            matrix = pooling_matrix(grid, spec.down_factor, learned.pool).to(key.device)
            stop = start + matrix.shape[1]
            keys.append(matrix @ key[:, :, start:stop])
            values.append(matrix @ value[:, :, start:stop])
            sees = torch.zeros(layout.num_tokens, matrix.shape[0], dtype=torch.bool)
            sees[start:stop] = True
            masks.append(sees)
        key, value, mask = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, 1)
    scale = spec.scale(query.shape[-1], layout.num_tokens) if scale is None else scale
    return _masked_softmax(query, key, value, mask, scale)


def exact_and_linear_masks(layout: TokenLayout, spec: MappedSpec) -> tuple[Tensor, Tensor]:
    """Return two (N, N) boolean masks: which keys a query sees exactly, and which through the feature maps."""
    exact = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    linear = torch.zeros_like(exact)
    for start, grid in layout.grids:
        tokens = torch.arange(start, start + grid[0] * grid[1] * grid[2])
        linear[:, tokens] = True
        if spec.rate is not None:
            exact[:, tokens[:: spec.rate]] = True
    for start, grid in layout.grids:
        if isinstance(spec, ChunkedSpec):
            frame, _, _ = _coordinates(grid)
            stop = start + len(frame)
            first_of_chunk = frame // spec.chunk_frames * spec.chunk_frames
            seen = frame[None, :] >= (first_of_chunk - spec.overlap_frames)[:, None]
            inside = seen & (frame[None, :] < (first_of_chunk + spec.chunk_frames)[:, None])
            exact[start:stop, start:stop] = inside
            if spec.causal:
                linear[start:stop, start:stop] = ~seen
    for start, stop in layout.global_ranges:
        exact[start:stop, :] = True
        exact[:, start:stop] = True
    return exact, linear & ~exact


def mapped_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: MappedSpec,
    learned: Learned,
    scale: float | None,
) -> Tensor:
    """Return linear, hybrid or chunked attention."""
    assert learned.maps is not None
    maps, stabilizer = learned.maps, spec.stabilizer
    exact, linear = (mask.to(query.device) for mask in exact_and_linear_masks(layout, spec))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    if not layout.num_tokens:  # no scores have no largest
        return scores @ value
    scores = scores.masked_fill(~exact, float("-inf"))
    if maps[0].is_exponential or stabilizer == "common":
        # linear keys count an estimate of exp(score), beside exp(score) of exact ones
        root = abs(factor) ** 0.5
        estimates = _log_products(maps[0].logs(query, root if factor >= 0 else -root), maps[1].logs(key, root))
        return torch.softmax(torch.where(linear, estimates, scores), dim=-1) @ value
    shift = scores.amax(-1, keepdim=True)
    if stabilizer == "lse":
        shift = scores.logsumexp(-1, keepdim=True)
    shift = torch.where(shift.isinf(), torch.zeros_like(shift), shift)  # a query without exact keys
    weights = (scores - shift).exp() + (maps[0](query) @ maps[1](key).transpose(-1, -2)) * linear
    # the dense rows of global queries have no linear keys, so the shift cancels there
    return (weights / weights.sum(-1, keepdim=True)) @ value


def _log_products(query_logs: Tensor, key_logs: Tensor) -> Tensor:
    """Return log sum_f exp(a_if + b_jf) for all queries i and keys j."""
    a, b = query_logs.amax(-1, keepdim=True), key_logs.amax(-1, keepdim=True)
    products = (query_logs - a).exp() @ (key_logs - b).exp().transpose(-1, -2)
    return products.clamp_min(1e-300).log() + a + b.transpose(-1, -2)


def pooling_matrix(grid: Grid, down_factor: int, weight: Tensor | None = None) -> Tensor:
    """Return the (P, N) matrix that takes the tokens of a grid to its pooled tokens, frame by frame.

    Cell (i, j) of a square counts with weight[i, j]; a square cut by the border is scaled by d^2 / (cells present), so
    that uniform weights always give the mean of what is there.
    """
    frames, height, width = grid
    d = down_factor
    weight = torch.full((d, d), 1 / d**2, dtype=torch.float64) if weight is None else weight.cpu()
    rows = []
    for t in range(frames):
        for top in range(0, height, d):
            for left in range(0, width, d):
                row = torch.zeros(frames, height, width, dtype=torch.float64)
                bottom, right = min(top + d, height), min(left + d, width)
                part = weight.double()[: bottom - top, : right - left]
                row[t, top:bottom, left:right] = part * (d * d / part.numel())
                rows.append(row.flatten())
    return torch.stack(rows)


def _masked_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) * scale
    return torch.softmax(scores.masked_fill(~mask.to(scores.device), float("-inf")), dim=-1) @ value


def _coordinates(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    t, y, x = (axis.flatten() for axis in axes)
    return t, y, x
