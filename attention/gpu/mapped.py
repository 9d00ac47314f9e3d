"""The sums of linear, hybrid and chunked attention on Triton kernels: an engine for `kinds/mapped.py`.

The kernels are in `kernels/mapped.py` and `kernels/state.py`. Maps that act on each number alone (elu1, relu) are
computed in the kernels. Features of the other maps are matrix products; PyTorch makes them for some thousand tokens at
a time, so they never exist for all tokens. With gradients they, and the exact keys of those queries, are computed again
in the backward pass. The exact part of stabilizer "lse" runs on the vendor's kernels. Gradients are those of PyTorch,
once differentiable, except that of keys with equal scores the first alone gets the gradient of the largest score.
Nothing here falls back to anything else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import FUSED_MAPS, GIVEN, LOGS, linear_state, mapped_attend
from ..kinds.feature_maps import TINY, FeatureMap
from ..kinds.linear import Engine, LinearState, RawState, State, is_on_raw_scale, no_keys, recomputed, roots

CHUNK_VALUES = 2**24  # features held at once; a launch of fewer queries would not fill a large card
MIN_PART = 64  # tokens at least


def summarise_with_triton(
    key: Tensor, value: Tensor, phi_k: FeatureMap, *, scale: float | None = None, stabilizer: str = "max"
) -> State:
    """Return the state of linear keys, as `summarise` does."""
    is_raw, root = is_on_raw_scale(phi_k, stabilizer), roots(scale, key.shape[-1])[1]
    if phi_k.name in FUSED_MAPS and key.shape[2]:
        return _raw(*linear_state(key, value, phi_k.name), phi_k.log_factor)

    def add(part: slice) -> State:
        k, v = key[:, :, part], value[:, :, part]
        if not is_raw:
            total, norm = linear_state(phi_k(k), v, GIVEN)
            return LinearState(total, norm[..., None])
        logs = phi_k.logs(k, root)
        largest = logs.detach().amax(2, keepdim=True)
        return _raw(*linear_state((logs - largest).exp(), v, GIVEN), largest.transpose(-1, -2))

    state = no_keys(key, phi_k, is_raw)
    for part in _parts(key.shape[2], key.shape[0] * key.shape[1] * phi_k.num_features):
        state = state + recomputed(add, part)
    return state


def _raw(total: Tensor, norm: Tensor, log_factor: Tensor | float) -> RawState:
    """Return a state from sums of features that lack a factor."""
    norm = norm[..., None].clamp_min(TINY)
    return RawState(total / norm, norm.log() + log_factor)


def mix_with_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    phi_q: FeatureMap,
    *,
    scale: float | None = None,
    stabilizer: str = "max",
) -> Tensor:
    """Return what queries make of exact keys and of a state, as `mix` does."""
    batch, heads, tokens, size = query.shape
    factor, exact = size**-0.5 if scale is None else scale, None
    if factor < 0:  # the kernels take the maximum before they scale
        key, factor = -key, -factor
    if isinstance(state, LinearState) and stabilizer == "lse" and key.shape[2]:
        exact = F.scaled_dot_product_attention(query, key, value, scale=factor)
        key, value = key[:, :, :0], value[:, :, :0]
    is_fused = phi_q.name in FUSED_MAPS
    log_factor = phi_q.log_factor if is_fused else 0.0  # the kernels leave it out

    def compute(part: slice) -> Tensor:
        q = query[:, :, part]
        given = None if exact is None else exact[:, :, part]
        if isinstance(state, LinearState):
            held = (phi_q(q), state.total, state.norm.squeeze(-1))
            return mapped_attend(q, key, value, *held, scale=factor, feature_map=GIVEN, exact=given)
        numbers, name = (q, phi_q.name) if is_fused else (phi_q.logs(q, roots(scale, size)[0]), LOGS)
        held = (numbers, state.mean, state.log_norm.squeeze(-1) + log_factor)
        return mapped_attend(q, key, value, *held, scale=factor, feature_map=name)

    if is_fused and tokens:
        return compute(slice(0, tokens))
    parts = [recomputed(compute, part) for part in _parts(tokens, batch * heads * phi_q.num_features)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) if parts else torch.empty_like(query)


TRITON = Engine(summarise_with_triton, mix_with_triton)


def _parts(length: int, values_per_token: int) -> list[slice]:
    """Return equal parts of 0..length, of at most about CHUNK_VALUES values each."""
    number = max(1, -(-length * values_per_token // CHUNK_VALUES))
    step = max(MIN_PART, -(-length // number))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
