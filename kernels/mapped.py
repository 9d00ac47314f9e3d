"""Exact and linear keys under one denominator as an operator of PyTorch: `mapped_attend`, its launches, its gradients.

It knows no tokens and no rate: exact keys come gathered, linear ones as a state. Features of queries are given, as such
or by their logs, or made of the numbers at hand where their map acts on each number alone. All but features as such are
on the raw scale: linear keys lose the same factor exp(-c) as exact ones, so that neither overflows.

dtypes: float16, bfloat16; the interpreter also float32. Given features of bfloat16 are multiplied in bfloat16, after
the state was centred, those of others in tf32, so that none overflows; on the raw scale all products are in the dtype.
Head sizes: up to 256; any number of features. Devices: NVIDIA from Ampere on; AMD where Triton runs. Gradients: all
tensors, through the maximum too; once differentiable. Deterministic: no atomics, a fixed order of keys. Accumulates in
fp32. Any strides, 64-bit offsets.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .capability import architecture
from .launch import block_size, log2_scale, on_device_of, rows_together, strides
from .state import GIVEN, precision, weighted_state
from .tuning import feature_stages, tile_for

FLOOR = 1e-30


def mapped_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor,
    state: Tensor,
    norm: Tensor,
    *,
    scale: float,
    feature_map: str = GIVEN,
    exact: Tensor | None = None,
) -> Tensor:
    """Return (sum exp(s - c) v + phi S) / (sum exp(s - c) + phi z) with s = scale q . k and c = max s of each query.

    On the raw scale (sum exp(s) v + phi S) / (sum exp(s) + phi z), which is softmax attention over more keys: the
    features, with scores log phi + log z and values S / z.

    Shapes:
        query: (B, H, M, D), M at least 1. key, value: (B, H, K, D), K may be 0: then the denominator is at least 1e-30.
        numbers: (B, H, M, F). state: (B, H, F, D), norm: (B, H, F), float32. Output: (B, H, M, D), contiguous.

    Args:
        numbers: what `feature_map` turns into features phi, which are not negative.
        state, norm: S and z; on the raw scale S / z and log z.
        scale: at least 0.
        feature_map: "given" where numbers are features. On the raw scale "logs" where numbers are their logs, or one of
            FUSED_MAPS.
        exact: (B, H, M, D), softmax attention from elsewhere. It replaces the first sums: (exact + phi S) /
            (1 + phi z), which is the above with c = log sum exp s. `key` is empty then. Not on the raw scale.

    Returns:
        The output in the dtype of `query`.

    Notes:
        Of keys with equal scores the first gets the gradient of the maximum, where `amax` shares it between them.

    Source: Attention Surgery (arXiv 2509.24899), equation of section 3.
    """
    assert exact is None or (key.shape[2] == 0 and feature_map == GIVEN)
    tensors = (query, key, value, numbers, state, norm, exact)
    return torch.ops.linearize.mapped_forward(*tensors, scale, feature_map)[0]


def mapped_forward(
    query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, state: Tensor, norm: Tensor, exact: Tensor | None,
    scale: float, feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the output, and (B, H, M) float32 statistics: c + log2 of each denominator, and the denominator."""
    from .mapped_forward import mapped_forward_kernel

    kernel: Any = mapped_forward_kernel
    inputs = [rows_together(tensor) for tensor in (query, key, value, numbers, query if exact is None else exact)]
    out, lse, den = _forward_shapes(query)
    with on_device_of(query):
        grid, options = _launch("mapped_forward", query, query.shape[2])
        kernel[grid](
            *inputs, *_prepared(state, norm, query.dtype, feature_map), out, lse, den, *strides(*inputs),
            log2_scale(scale), query.shape[2], key.shape[2], query.shape[1],
            **_linear_options(numbers, query, feature_map), HAS_EXACT=exact is not None,
            FEATURE_STAGES=stages_over_features("mapped_forward", query), **options,
        )  # fmt: skip
    return out, lse, den


def mapped_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, state: Tensor, norm: Tensor,
    out: Tensor, lse: Tensor, den: Tensor, scale: float, feature_map: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key, value, numbers, state and norm, contiguous."""
    from .mapped_backward import mapped_dk_dv_kernel, mapped_dq_kernel, mapped_dx_kernel

    dx_kernel: Any = mapped_dx_kernel
    dq_kernel: Any = mapped_dq_kernel
    dk_dv_kernel: Any = mapped_dk_dv_kernel
    query, key, value, x, grad = (rows_together(tensor) for tensor in (query, key, value, numbers, grad))
    dq, dk, dv, dx = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value, x))
    delta, pull = (torch.empty(den.shape, dtype=torch.float32, device=den.device) for _ in range(2))
    top_key = torch.empty(den.shape, dtype=torch.int32, device=den.device)
    sizes = (log2_scale(scale), query.shape[2], key.shape[2], query.shape[1])
    held, z, centre = _prepared(state, norm, query.dtype, feature_map)
    with on_device_of(query):
        grid, options = _launch("mapped_dx", query, query.shape[2])
        dx_kernel[grid](
            x, grad, out, held, z, centre, lse, den, delta, dx, *strides(x, grad),
            query.shape[2], query.shape[1], **_linear_options(x, query, feature_map), **options,
        )  # fmt: skip
        grid, options = _launch("mapped_dq", query, query.shape[2])
        dq_kernel[grid](
            query, key, value, grad, lse, den, delta, pull, top_key, dq,
            *strides(query, key, value, grad), *sizes, MAP=feature_map, **options,
        )  # fmt: skip
        if key.shape[2]:
            grid, options = _launch("mapped_dk_dv", query, key.shape[2])
            dk_dv_kernel[grid](
                query, key, value, grad, lse, delta, pull, top_key, dk, dv,
                *strides(query, key, value, grad), *sizes, **options,
            )  # fmt: skip
    d_state, d_norm = weighted_state(x, grad, feature_map, z, lse, den, delta)
    if feature_map != GIVEN:  # the score log z gets the same as log phi, summed over queries
        d_norm = d_norm + (d_state * state).sum(-1)
    return dq, dk, dv, dx, d_state, d_norm


def _prepared(state: Tensor, norm: Tensor, dtype: torch.dtype, feature_map: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return S - z m^T in the dtype of products, z, and m, the mean that is added back where nothing is rounded.

    On the raw scale S / z, which is rounded like any value, log2 z, and m = 0.
    """
    if feature_map != GIVEN:
        return state.to(dtype).contiguous(), (norm / math.log(2)).contiguous(), torch.zeros_like(state[:, :, 0])
    centre = state.sum(2) / norm.sum(2).clamp_min(FLOOR)[..., None]
    centred = state - norm[..., None] * centre[:, :, None]
    return centred.to(dtype if dtype == torch.bfloat16 else torch.float32).contiguous(), norm.contiguous(), centre


def _launch(kernel: str, query: Tensor, num_rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return grid and compile-time options of one kernel."""
    batch, heads, _, size = query.shape
    tile = tile_for(kernel, architecture(query.device), size)
    options = {
        "SIZE": size,
        "BLOCK_SIZE": block_size(size),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (-(-num_rows // tile.rows), batch * heads), options


def stages_over_features(kernel: str, query: Tensor) -> int:
    """Return the stages of a kernel's loop over features on the device of `query`."""
    card = architecture(query.device)
    return feature_stages(card, tile_for(kernel, card, query.shape[-1]))


def _linear_options(numbers: Tensor, query: Tensor, feature_map: str) -> dict[str, Any]:
    # 128 bytes in the dtype of products; on the raw scale fewer, because numbers and scores of each are held
    block = 64 if query.dtype == torch.bfloat16 and feature_map == GIVEN else 32
    return {"FEATURES": numbers.shape[-1], "BLOCK_FEATURES": block, "MAP": feature_map, "PRECISION": precision()}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, exact, ctx.scale, ctx.feature_map = inputs
    ctx.has_exact = exact is not None
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    d_exact = (grad / saved[-1][..., None]).to(grad.dtype) if ctx.has_exact else None
    gradients = torch.ops.linearize.mapped_backward(grad, *saved, ctx.scale, ctx.feature_map)
    return *gradients, d_exact, None, None


def _forward_shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse, den = (torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) for _ in range(2))
    return out, lse, den


def _backward_shapes(_: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in tensors[:6])


def _refuse(*_: Any) -> None:
    raise RuntimeError("the gradients of attention with feature maps cannot be differentiated again")


def _define() -> torch.library.Library | None:
    """Define the operators once per process: the pack may be imported under two names."""
    if hasattr(torch.ops.linearize, "mapped_forward"):
        return None
    library = torch.library.Library("linearize", "FRAGMENT")
    inputs = "Tensor query, Tensor key, Tensor value, Tensor numbers, Tensor state, Tensor norm"
    options = "float scale, str feature_map"
    library.define(f"mapped_forward({inputs}, Tensor? exact, {options}) -> (Tensor, Tensor, Tensor)")
    saved = f"Tensor grad, {inputs}, Tensor out, Tensor lse, Tensor den"
    library.define(f"mapped_backward({saved}, {options}) -> ({', '.join(['Tensor'] * 6)})")
    for function in (mapped_forward, mapped_backward):
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
    forward, backward = "linearize::mapped_forward", "linearize::mapped_backward"
    torch.library.register_fake(forward, _forward_shapes, lib=library)
    torch.library.register_fake(backward, _backward_shapes, lib=library)
    torch.library.register_autograd(forward, _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(backward, _refuse, lib=library)
    return library


_library = _define()  # an operator lives as long as its library
