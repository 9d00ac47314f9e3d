"""Other rules that need no training, for comparison alone: what they drop, how they choose, what stands for the rest.

PISA (arXiv 2602.01077) takes runs of consecutive tokens, the best share of them, means and one first-order term.
Sol-Attn (arXiv 2607.24027) takes runs too; exact is what scores above mean + tau * deviation of a query run's scores,
and the neighbours of its own run; means stand for the rest. "Rest dropped" leaves means out. All are dense attention
under masks here, which computes the same function at a small size; their kernels are not judged.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

RUNS, TILES = "runs", "tiles"
DROPPED, MEANS, FIRST_ORDER = "dropped", "means", "first order"
EPSILON = 1e-6  # of Sol-Attn's variance
TALLY: list[float] = []  # shares of the image keys that image queries saw, a number per call


def means_of(tensor: Tensor, cells: Tensor) -> Tensor:
    """Return the means of cells, (B, H, N, D) and (C, n) to (B, H, C, D); -1 fills short cells."""
    real = cells >= 0
    return (tensor[:, :, cells.clamp_min(0)] * real[..., None]).sum(3) / real.sum(1)[:, None]


def rule_attention(
    query: Tensor, key: Tensor, value: Tensor, loose: Tensor, cells: Tensor, exact: Tensor, rest: str, scale: float
) -> Tensor:
    """Return attention in which cells see some cells exactly, and note in TALLY what share of the keys a query saw.

    Shapes:
        query, key, value: (B, H, N, D) float32. loose: (G,), tokens that see and are seen by everything. cells: (C, n).
        exact: (B, H, C, C) bool. Output: (B, H, N, D).

    Args:
        rest: what stands for the other cells: DROPPED, MEANS or FIRST_ORDER.
    """
    real = cells >= 0
    tokens, of_token, counts = cells[real], real.nonzero()[:, 0], real.sum(1)
    output = torch.empty_like(query)
    output[:, :, loose] = torch.softmax(query[:, :, loose] @ key.transpose(-1, -2) * scale, -1) @ value
    mine, order = query[:, :, tokens] * scale, torch.cat([loose, tokens])
    penalty = torch.where(exact, 0.0, -math.inf)[:, :, of_token]
    scores = mine @ key[:, :, order].transpose(-1, -2)
    scores[..., len(loose) :] += penalty[..., of_token]
    values = value[:, :, order]
    seen = exact[:, :, of_token].float() @ counts.float()  # exact keys of each query
    if rest != DROPPED:
        k_means = means_of(key, cells)
        far = mine @ k_means.transpose(-1, -2) + torch.where(exact, -math.inf, counts.log())[:, :, of_token]
        scores, values = torch.cat([scores, far], -1), torch.cat([values, means_of(value, cells)], 2)
        seen = seen + (~exact[:, :, of_token]).float().sum(-1)
    weights = scores.softmax(-1)
    found = weights @ values
    if rest == FIRST_ORDER:
        spread = key[:, :, tokens] - means_of(key, cells)[:, :, of_token]
        slope = spread.transpose(-1, -2) @ value[:, :, tokens] / len(tokens)
        found += weights[..., len(order) :].sum(-1, keepdim=True) * (mine @ slope)
    output[:, :, tokens] = found
    TALLY.append(float(seen.mean()) / len(tokens))
    return output


def chosen_runs(
    query: Tensor, key: Tensor, top: float, tau: float | None, band: int, scale: float, spread: Tensor | None = None
) -> Tensor:
    """Return which runs of keys each run of queries sees exactly, (B, H, C, C) bool.

    Args:
        query, key: (B, H, C, D), means of runs.
        spread: (B, H, C, D), variances of the keys in a run along the axes, whose deviation is added to its score.
        top: share of the runs that is taken beside the band; used where `tau` is None.
        tau: deviations above the mean score of a run of queries, along the axes, from which a run is taken.
        band: runs before and after a run's own that are exact with it.
    """
    places = torch.arange(query.shape[2])
    near = (places[:, None] - places).abs() <= band
    scores = query @ key.transpose(-1, -2) * scale
    if spread is not None:
        scores = scores + ((query * scale).square() @ spread.clamp_min(0).transpose(-1, -2)).sqrt()
    if tau is not None:
        middle = query @ key.mean(2, keepdim=True).transpose(-1, -2) * scale
        variance = (query * scale).square() @ key.var(2, unbiased=False, keepdim=True).transpose(-1, -2)
        return near | (scores >= middle + tau * (variance + EPSILON).sqrt())
    scores = scores.masked_fill(near, -math.inf)
    count = min(math.ceil(top * len(places) - 1e-9), len(places))
    return near | torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)


def cells_of_runs(start: int, count: int, length: int) -> Tensor:
    """Return consecutive tokens as cells, (C, length); -1 fills the last."""
    tokens = torch.full((-(-count // length) * length,), -1)
    tokens[:count] = torch.arange(start, start + count)
    return tokens.unflatten(0, (-1, length))


def add_rivals(laboratory: Any) -> None:
    """Let specs name these rules, as kind "rival", in this process only."""
    specs, kinds, layouts, foveated = (
        laboratory.module(f"attention.{name}") for name in ("specs", "kinds.kind", "layout", "kinds.foveated")
    )
    parts = laboratory.module("attention.kinds.foveated_cells")

    @dataclass(frozen=True, slots=True)
    class RivalSpec(specs.Spec):
        """Runs of `length` tokens as in `chosen_runs`, a `tau` of -1 for none; or the pack's tiles and its choice."""

        kind: ClassVar[str] = "rival"
        cut: str = RUNS
        length: int = 16
        frames: int = 1
        top: float = 0.0
        tau: float = -1.0
        band: int = 0
        rest: str = MEANS
        by_scores: bool = False  # tiles are chosen by mean and deviation of q . k

    def run(query, key, value, layout, spec, learned, *, scale, memory):  # noqa: ANN001, ANN202
        ((start, grid),), scale = layout.grids, query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (tensor.float() for tensor in (query, key, value))
        if spec.cut == RUNS:
            cells = cells_of_runs(start, math.prod(grid), spec.length)
            tau = None if spec.tau < 0 else spec.tau
            exact = chosen_runs(means_of(q, cells), means_of(k, cells), spec.top, tau, spec.band, scale)
        else:
            tokens = parts.cells_of(grid, (min(spec.frames, grid[0]), spec.length, spec.length)).tokens
            cells = torch.where(tokens < 0, -1, tokens + start)
            if spec.by_scores:
                q_means, k_means = means_of(q, cells), means_of(k, cells)
                spread = means_of(k.square(), cells) - k_means.square()
                exact = chosen_runs(q_means, k_means, spec.top, None, 0, scale, spread)
            else:
                ours = specs.FoveatedSpec(1, spec.top, spec.length, spec.frames)
                choice = foveated.tiles_of(q, k, v, layout, ours, scale=scale)
                exact = torch.eye(len(cells), dtype=torch.bool) | parts.mask_of(choice, len(cells))
        loose = layouts.token_indices(layout.global_ranges)
        return rule_attention(q, k, v, loose, cells, exact, spec.rest, scale).to(query.dtype)

    def pairs(spec: Any, layout: Any) -> int:
        return layout.num_tokens**2  # what is not counted; TALLY has the share of keys

    kinds.register(kinds.Kind(RivalSpec, reference=None, run=run, pairs=pairs, colour=(0, 0, 0)))
