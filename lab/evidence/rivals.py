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


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule.

    Args:
        cells: (C, n), the grid tokens of each cell of queries and keys; -1 fills short ones.
        top: share of the cells that each cell of queries sees exactly, beside its band; used where `tau` is None.
        tau: deviations above the mean score of a cell of queries from which a cell is exact.
        band: cells before and after a cell's own that are exact with it.
        spread: add the spread of the scores inside a cell to its score.
        rest: DROPPED, MEANS or FIRST_ORDER.
    """

    cells: Tensor
    top: float = 0.0
    tau: float | None = None
    band: int = 0
    spread: bool = False
    rest: str = MEANS


def rule_attention(query: Tensor, key: Tensor, value: Tensor, loose: Tensor, rule: Rule, scale: float) -> Tensor:
    """Return attention under a rule, and note in TALLY what share of the image keys a query saw.

    Shapes:
        query, key, value: (B, H, N, D). loose: (G,), tokens that see and are seen by everything. Output: (B, H, N, D).
    """
    real = rule.cells >= 0
    tokens, of_token = rule.cells[real], real.nonzero()[:, 0]
    counts = real.sum(1)

    def means(tensor: Tensor) -> Tensor:
        held = tensor[:, :, rule.cells.clamp_min(0)] * real[..., None]
        return held.sum(3) / counts[:, None]

    q, k, v = (tensor.float() for tensor in (query, key, value))
    q_means, k_means, v_means = means(q), means(k), means(v)
    exact = chosen(q_means, k_means, means(k.square()) - k_means.square(), rule, scale)
    output = torch.empty_like(q)
    output[:, :, loose] = torch.softmax(q[:, :, loose] @ k.transpose(-1, -2) * scale, -1) @ v
    mine, order = q[:, :, tokens] * scale, torch.cat([loose, tokens])
    penalty = torch.where(exact, 0.0, -math.inf)[:, :, of_token]
    scores = mine @ k[:, :, order].transpose(-1, -2)
    scores[..., len(loose) :] += penalty[..., of_token]
    values = v[:, :, order]
    seen = exact[:, :, of_token].float() @ counts.float()  # exact keys of each query
    if rule.rest != DROPPED:
        far = mine @ k_means.transpose(-1, -2) + torch.where(exact, -math.inf, counts.log())[:, :, of_token]
        scores, values = torch.cat([scores, far], -1), torch.cat([values, v_means], 2)
        seen = seen + (~exact[:, :, of_token]).float().sum(-1)
    weights = scores.softmax(-1)
    found = weights @ values
    if rule.rest == FIRST_ORDER:
        slope = (k[:, :, tokens] - k_means[:, :, of_token]).transpose(-1, -2) @ v[:, :, tokens] / len(tokens)
        found += weights[..., len(order) :].sum(-1, keepdim=True) * (mine @ slope)
    output[:, :, tokens] = found
    TALLY.append(float(seen.mean()) / len(tokens))
    return output.to(query.dtype)


def chosen(query: Tensor, key: Tensor, variance: Tensor, rule: Rule, scale: float) -> Tensor:
    """Return which cells of keys each cell of queries sees exactly, (B, H, C, C) bool.

    Shapes:
        query, key, variance: (B, H, C, D), means of cells, and the variance of keys inside them along the axes.
    """
    places = torch.arange(query.shape[2])
    band = (places[:, None] - places).abs() <= rule.band
    scores = query @ key.transpose(-1, -2) * scale
    if rule.spread:
        scores = scores + ((query * scale).square() @ variance.clamp_min(0).transpose(-1, -2)).sqrt()
    if rule.tau is not None:
        middle = query @ key.mean(2, keepdim=True).transpose(-1, -2) * scale
        spread = (query * scale).square() @ key.var(2, unbiased=False, keepdim=True).transpose(-1, -2)
        return band | (scores >= middle + rule.tau * (spread + EPSILON).sqrt())
    scores = scores.masked_fill(band, -math.inf)
    count = min(math.ceil(rule.top * len(places) - 1e-9), len(places))
    return band | torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)


def cells_of_runs(start: int, count: int, length: int) -> Tensor:
    """Return consecutive tokens as cells, (C, length); -1 fills the last."""
    tokens = torch.full((-(-count // length) * length,), -1)
    tokens[:count] = torch.arange(start, start + count)
    return tokens.unflatten(0, (-1, length))


def add_rivals(laboratory: Any) -> None:
    """Let specs name these rules, as kind "rival", in this process only."""
    specs, kinds = (laboratory.module(f"attention.{name}") for name in ("specs", "kinds.kind"))
    boxes = laboratory.module("attention.kinds.foveated_cells").cells_of
    layouts = laboratory.module("attention.layout")

    @dataclass(frozen=True, slots=True)
    class RivalSpec(specs.Spec):
        """A rule: runs of `length` tokens, or tiles of a side; the others as in `Rule`, a `tau` of -1 for none."""

        kind: ClassVar[str] = "rival"
        cut: str = RUNS
        length: int = 16
        frames: int = 1
        top: float = 0.0
        tau: float = -1.0
        band: int = 0
        spread: bool = False
        rest: str = MEANS

    def run(query, key, value, layout, spec, learned, *, scale, memory):  # noqa: ANN001, ANN202
        ((start, grid),) = layout.grids
        if spec.cut == RUNS:
            cells = cells_of_runs(start, math.prod(grid), spec.length)
        else:
            tokens = boxes(grid, (min(spec.frames, grid[0]), spec.length, spec.length)).tokens
            cells = torch.where(tokens < 0, -1, tokens + start)
        rule = Rule(cells, spec.top, None if spec.tau < 0 else spec.tau, spec.band, spec.spread, spec.rest)
        loose = layouts.token_indices(layout.global_ranges)
        return rule_attention(query, key, value, loose, rule, query.shape[-1] ** -0.5 if scale is None else scale)

    def pairs(spec: Any, layout: Any) -> int:
        return layout.num_tokens**2  # what is not counted; TALLY has the share of keys

    kinds.register(kinds.Kind(RivalSpec, reference=None, run=run, pairs=pairs, colour=(0, 0, 0)))
