"""Linear, hybrid and chunked attention on Triton kernels: an engine for them, and a test of it before its first use.

Which tokens are exact is decided in `linear.py`, `hybrid.py` and `chunked.py`, as for PyTorch; the mathematics are in
`kernels/`. Maps that act on each number alone (elu1, relu) are computed in the kernels. Features of the other maps are
matrix products; PyTorch makes them for some thousand tokens at a time, so they never exist for all tokens. With
gradients they, and the exact keys of those queries, are computed again in the backward pass. Dense attention of global
queries, and the exact part of stabilizer "lse", run on the vendor's kernels. Nothing here falls back to anything else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import GIVEN, LOGS, capability, linear_state, mixed_attend, tuning
from ..kinds.feature_maps import MAPS, TINY, Elementwise, FeatureMap, Maps
from ..kinds.linear import Engine, LinearState, RawState, State, is_on_raw_scale, no_keys, recomputed, roots
from ..kinds.mapped import mapped_attention
from ..kinds.reference import reference_attention
from ..layout import Reason, Segment, TokenLayout, grid_segment
from ..specs import HybridSpec, LinearSpec, MappedSpec
from .clear import Tested, judge, tested_once

CHUNK_VALUES = 2**24  # features held at once; a launch of fewer queries would not fill a large card
MIN_PART = 64  # tokens at least
_tested: dict[Tested, Reason | None] = {}


def mixed_device_refusal(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Reason | None:
    """Return why the kernels cannot run on a device, or None; their first use there is preceded by a test of them."""
    refusal = capability.refusal(device, dtype, head_dim)
    return Reason(*refusal) if refusal else _self_test_result((device, dtype, head_dim, needs_grad))


def mixed_with_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: MappedSpec,
    maps: Maps,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return linear, hybrid or chunked attention, as the function of that kind does with PyTorch.

    Shapes:
        query, key, value: (B, H, N, D), any strides, N = layout.num_tokens. Output: (B, H, N, D), contiguous.

    Args:
        layout, maps, scale: as in `linear_attention`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors.

    Notes:
        Gradients for query, key, value and the parameters of the maps; once differentiable. They are those of PyTorch,
        except that of keys with equal scores the first alone gets the gradient of the largest score.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)
    return mapped_attention(query, key, value, layout, spec, maps, scale=scale, engine=TRITON)


def summarise_with_triton(
    key: Tensor, value: Tensor, phi_k: FeatureMap, *, scale: float | None = None, stabilizer: str = "max"
) -> State:
    """Return the state of linear keys, as `summarise` does."""
    is_raw, root = is_on_raw_scale(phi_k, stabilizer), roots(scale, key.shape[-1])[1]
    if isinstance(phi_k, Elementwise) and key.shape[2]:
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
    is_fused = isinstance(phi_q, Elementwise)
    log_factor = phi_q.log_factor if isinstance(phi_q, Elementwise) else 0.0  # the kernels leave it out

    def compute(part: slice) -> Tensor:
        q = query[:, :, part]
        given = None if exact is None else exact[:, :, part]
        if isinstance(state, LinearState):
            held = (phi_q(q), state.total, state.norm.squeeze(-1))
            return mixed_attend(q, key, value, *held, scale=factor, feature_map=GIVEN, exact=given)
        numbers, name = (q, phi_q.name) if is_fused else (phi_q.logs(q, roots(scale, size)[0]), LOGS)
        held = (numbers, state.mean, state.log_norm.squeeze(-1) + log_factor)
        return mixed_attend(q, key, value, *held, scale=factor, feature_map=name)

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


def _self_test_result(case: Tested) -> Reason | None:
    return tested_once(case, _tested, _self_test)


def _self_test(case: Tested) -> Reason | None:
    return judge(case, lambda: mixed_self_test_error(*case), tuning.MIXED_KERNELS)


def mixed_self_test_error(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> float:
    """Return the largest relative error of the kernels against the reference on a small clip, outputs and gradients.

    The clip has more tokens and more exact keys than the kernels take at once, no multiple of either. Features are
    given, or their logs, or computed in the kernels; there are calls with exact keys, one without and one with the
    vendor's.
    """
    layout = TokenLayout.of((grid_segment("main", 3, 7, 9), Segment("text", 5)))
    alone = TokenLayout.of((grid_segment("main", 3, 7, 9),))
    cases = [(layout, HybridSpec(2), "hedgehog"), (layout, HybridSpec(3, stabilizer="lse"), "hedgehog"),
             (layout, HybridSpec(2), "favor"), (alone, LinearSpec(), "elu1")]  # fmt: skip
    with torch.inference_mode(False), torch.set_grad_enabled(needs_grad), torch.autocast(device.type, enabled=False):
        return max(_error(device, dtype, head_dim, needs_grad, *each) for each in cases)


def _error(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    layout: TokenLayout,
    spec: LinearSpec | HybridSpec,
    name: str,
) -> float:
    generator, maps = torch.Generator("cpu").manual_seed(0), (MAPS[name](2, head_dim), MAPS[name](2, head_dim))
    for each in maps:
        each.reset(generator)
        each.to(device)
    shape = (1, 2, layout.num_tokens, head_dim)
    inputs = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(4)]
    *leaves, grad = [tensor.requires_grad_(needs_grad) for tensor in inputs]
    query, key, value = leaves
    output = mixed_with_triton(query, key, value, layout, spec, maps)
    truth = reference_attention(query, key, value, layout, spec, maps=maps)
    pairs = [(output, truth)]
    if needs_grad:
        pairs += zip(
            torch.autograd.grad(output, leaves, grad.detach()),
            torch.autograd.grad(truth, leaves, grad.detach().double()),
            strict=True,
        )
    with torch.no_grad():
        return max(float((mine.double() - true).norm() / true.norm()) for mine, true in pairs)
