"""The sums of linear attention in PyTorch: states of keys, and what queries make of them beside exact keys.

Queries meet two sets of keys. *Exact* keys count with exp(score - c), where c belongs to the query; *linear* keys count
with phi_q(q) . phi_k(k), through a state whose size does not depend on their number:

    y = (sum exp(s - c) v + phi_q(q) S) / (sum exp(s - c) + phi_q(q) z),   S = sum phi_k(k) v^T,   z = sum phi_k(k)

That is for learned maps, which find the scale that c leaves. Maps without parameters estimate exp(s) itself, so on the
*raw scale* both sorts of keys lose the same factor exp(-c), and c does not matter. Then a feature is one key more: its
score is log phi_q + log z, its value S / z, and a softmax over exact keys and features is the whole of it.

Everything here is chunked, so that neither scores nor features of all tokens are held at once; with gradients the
chunks are computed again in the backward pass. State, features and denominators are fp32 (float64 for float64).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..layout import TokenLayout
from .feature_maps import FeatureMap

FLOOR = 1e-30  # of a denominator without keys; features have a bound that keeps others above
NOTHING = -1e30  # the log of no weight; finite, so that differences are numbers
CHUNK_VALUES = 2**22  # scores or features held at once, but
MIN_CHUNK = 64  # tokens at least


@dataclass(frozen=True, slots=True)
class LinearState:
    """What queries need to know of linear keys.

    Args:
        total: (B, H, F, D), the sum of phi_k(k) v^T.
        norm: (B, H, F, 1), the sum of phi_k(k).
    """

    total: Tensor
    norm: Tensor

    def __add__(self, other: "State") -> "State":
        assert isinstance(other, LinearState)
        return LinearState(self.total + other.total, self.norm + other.norm)


@dataclass(frozen=True, slots=True)
class RawState:
    """What queries need to know of linear keys on the raw scale, where sums of features have no bound.

    Args:
        mean: (B, H, F, D), the sum of phi_k(k) v^T over that of phi_k(k).
        log_norm: (B, H, F, 1), the log of the latter; of no keys NOTHING.
    """

    mean: Tensor
    log_norm: Tensor

    def __add__(self, other: "State") -> "State":
        assert isinstance(other, RawState)
        log_norm = torch.logaddexp(self.log_norm, other.log_norm)
        mine, theirs = (self.log_norm - log_norm).exp(), (other.log_norm - log_norm).exp()
        return RawState(self.mean * mine + other.mean * theirs, log_norm)


State = LinearState | RawState


class Engine(NamedTuple):
    """Who computes states and what queries make of them: `TORCH` below, or kernels with the same signatures."""

    summarise: Callable[..., State]
    mix: Callable[..., Tensor]


def is_on_raw_scale(feature_map: FeatureMap, stabilizer: str) -> bool:
    """Return whether linear keys count like exp(s), so that their state is a `RawState`."""
    return feature_map.is_exponential or stabilizer == "common"


def roots(scale: float | None, head_dim: int) -> tuple[float, float]:
    """Return factors of queries and keys whose product is the scale of scores."""
    factor = head_dim**-0.5 if scale is None else scale
    root = math.sqrt(abs(factor))
    return math.copysign(root, factor), root


def no_keys(key: Tensor, phi_k: FeatureMap, is_raw: bool) -> State:
    """Return the state of no keys, for keys and values (B, H, n, D)."""
    batch, heads, _, size = key.shape
    options = {"dtype": torch.promote_types(key.dtype, torch.float32), "device": key.device}
    total = torch.zeros(batch, heads, phi_k.num_features, size, **options)
    norm = torch.zeros(batch, heads, phi_k.num_features, 1, **options)
    return RawState(total, norm + NOTHING) if is_raw else LinearState(total, norm)


def summarise(
    key: Tensor, value: Tensor, phi_k: FeatureMap, *, scale: float | None = None, stabilizer: str = "max"
) -> State:
    """Return the state of linear keys, (B, H, n, D) each, as queries of this scale and stabilizer need it."""
    is_raw, root = is_on_raw_scale(phi_k, stabilizer), roots(scale, key.shape[-1])[1]
    dtype = torch.promote_types(key.dtype, torch.float32)

    def add(part: slice) -> State:
        k, v = key[:, :, part], value[:, :, part].to(dtype)
        if is_raw:
            logs = phi_k.logs(k, root).transpose(-1, -2)
            return RawState(logs.softmax(-1) @ v, logs.logsumexp(-1, keepdim=True))
        features = phi_k(k).transpose(-1, -2)
        return LinearState(features @ v, features.sum(-1, keepdim=True))

    state = no_keys(key, phi_k, is_raw)
    for part in chunks(key.shape[2], key.shape[0] * key.shape[1] * phi_k.num_features):
        state = state + recomputed(add, part)
    return state


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    phi_q: FeatureMap,
    *,
    scale: float | None = None,
    stabilizer: str = "max",
) -> Tensor:
    """Return what queries make of exact keys and of a state.

    Shapes:
        query: (B, H, M, D). key, value: (B, H, K, D), K may be 0. Output: (B, H, M, D), in the dtype of `query`.

    Args:
        state: of `summarise` with the same scale and stabilizer.
        stabilizer: c of the formula above: "max", the largest score, as in Attention Surgery; or "lse", the log of the
            sum of exponents, with which exact keys weigh 1 in all and any dense kernel computes them. With a `RawState`
            there is no choice.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weigh = _weigh_none if key.shape[2] == 0 else _weigh_by_lse if stabilizer == "lse" else _weigh_by_max

    def compute(part: slice) -> Tensor:
        q = query[:, :, part]
        if isinstance(state, RawState):
            return _softmax_over_all(q, key, value, state, phi_q.logs(q, roots(scale, q.shape[-1])[0]), factor)
        features = phi_q(q)
        numerator, denominator = weigh(q, key, value, factor)
        numerator = numerator + features @ state.total
        return (numerator / (denominator + features @ state.norm).clamp_min(FLOOR)).to(query.dtype)

    has_scores = isinstance(state, RawState) or stabilizer != "lse"
    held = phi_q.num_features + (key.shape[2] if has_scores else 0)
    parts = [recomputed(compute, part) for part in chunks(query.shape[2], query.shape[0] * query.shape[1] * held)]
    return torch.cat(parts, dim=2) if parts else query.new_empty(query.shape)


TORCH = Engine(summarise, mix)
Weighed = tuple[Tensor | float, Tensor | float]


def _softmax_over_all(query: Tensor, key: Tensor, value: Tensor, state: RawState, logs: Tensor, scale: float) -> Tensor:
    dtype = state.mean.dtype
    scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-1, -2)
    weights = torch.cat((scores, logs + state.log_norm.transpose(-1, -2)), dim=-1).softmax(-1)
    of_keys, of_features = weights.split((key.shape[2], logs.shape[-1]), dim=-1)
    return (of_keys @ value.to(dtype) + of_features @ state.mean).to(query.dtype)


def _weigh_none(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Weighed:
    return 0.0, 0.0


def _weigh_by_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Weighed:
    exact = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return exact.to(torch.promote_types(query.dtype, torch.float32)), 1.0


def _weigh_by_max(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Weighed:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-1, -2)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights @ value.to(dtype), weights.sum(-1, keepdim=True)


def dense_for_global_queries(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None
) -> Tensor:
    """Return an output whose global rows are dense attention over everything; the other rows are not written yet."""
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for start, stop in layout.global_ranges:
        dense = F.scaled_dot_product_attention(query[:, :, start:stop], key, value, scale=scale)
        output = output.slice_scatter(dense, 2, start, stop)
    return output


def chunks(length: int, values_per_token: int) -> Iterator[slice]:
    """Yield slices of 0..length that hold about CHUNK_VALUES values each."""
    step = max(MIN_CHUNK, CHUNK_VALUES // max(1, values_per_token))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def recomputed(function: Callable, part: slice):
    """Return function(part); with gradients its intermediate tensors are dropped and computed again when needed."""
    if torch.is_grad_enabled():
        return checkpoint(function, part, use_reentrant=False)
    return function(part)
