"""The state of linear keys as an operator of PyTorch: `linear_state`, its shares, its gradients.

Fused are maps that act on each number alone (FUSED_MAPS); features of other maps are given, and should be given in
parts, because whoever makes them holds them. In the backward pass features of some thousand tokens exist at a time.
What queries ask of a state in the backward pass is the same sum with weights: `weighted_state`.

dtypes: float16, bfloat16; the interpreter also float32. Products of bfloat16 are taken in bfloat16, others in tf32.
Head sizes: up to 256; any number of features. Gradients: numbers and values. Deterministic: shares in a fixed order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .capability import architecture
from .launch import block_size, on_device_of, rows_together, strides
from .tuning import feature_stages, tile_for

Mapped = tuple[Tensor, Tensor]  # features and their derivatives
GIVEN, LOGS = "given", "logs"
FUSED_MAPS: dict[str, Callable[[Tensor], Mapped]] = {
    "elu1": lambda x: (F.elu(x) + 1, x.clamp_max(0).exp()),
    "relu": lambda x: (x.relu(), (x > 0).to(x.dtype)),
}
SHARE_TOKENS = 1024  # at least, of one program
NUM_PROGRAMS = 512  # beyond which tokens are not shared; the same everywhere, or results would depend on the device
BACKWARD_TOKENS = 4096


def linear_state(numbers: Tensor, value: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """Return the sums of phi^T v and of phi over tokens.

    Shapes:
        numbers: (B, H, N, F). value: (B, H, N, D). Output: (B, H, F, D) and (B, H, F), float32.

    Args:
        numbers: what the map turns into features: keys where it is fused, else features of any float dtype.
        feature_map: one of FUSED_MAPS, or "given".
    """
    return torch.ops.linearize.linear_state(numbers, value, feature_map)


def state_forward(numbers: Tensor, value: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    return _launch(numbers, value, feature_map, None)


def weighted_state(
    numbers: Tensor, grad: Tensor, feature_map: str, log2_z: Tensor, lse: Tensor, den: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum w^T grad and -sum w delta, with w = phi / den; on the raw scale exp2(log2 phi + log2_z - lse).

    Shapes:
        numbers: (B, H, N, F). grad: (B, H, N, D). log2_z: (B, H, F). lse, den, delta: (B, H, N). Output as above.

    Args:
        feature_map: "given", else features are on the raw scale: one of FUSED_MAPS, or "logs".
    """
    return _launch(numbers, grad, feature_map, (log2_z, lse, den, delta))


def _launch(
    numbers: Tensor, value: Tensor, feature_map: str, weights: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor]:
    from .state_forward import state_kernel

    kernel: Any = state_kernel
    numbers, value = rows_together(numbers), rows_together(value)
    (batch, heads, tokens, features), size = numbers.shape, value.shape[-1]
    card = architecture(value.device)
    tile = tile_for("state", card, size)
    programs = -(-features // tile.rows) * batch * heads
    shares = max(1, min(NUM_PROGRAMS // max(1, programs), tokens // SHARE_TOKENS))
    total = torch.empty((shares, batch, heads, features, size), dtype=torch.float32, device=value.device)
    norm = torch.empty((shares, batch, heads, features), dtype=torch.float32, device=value.device)
    with on_device_of(value):
        kernel[(-(-features // tile.rows), batch * heads, shares)](
            numbers, value, *(weights or (norm,) * 4), total, norm, *strides(numbers, value),
            tokens, heads, batch * heads, -(-tokens // shares),
            SIZE=size, BLOCK_SIZE=block_size(size), FEATURES=features, MAP=feature_map, PRECISION=precision(),
            IS_WEIGHTED=weights is not None, FEATURE_STAGES=feature_stages(card, tile),
            BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return total.sum(0), norm.sum(0)


def precision() -> str:
    """Return how products of float32 are taken: with ten bits where a card does so, exactly where it may not."""
    return "ieee" if torch.version.hip else "tf32"


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    numbers, value, ctx.feature_map = inputs
    ctx.save_for_backward(numbers, value)


def _differentiate(ctx: Any, d_total: Tensor, d_norm: Tensor) -> tuple[Any, ...]:
    numbers, value = ctx.saved_tensors
    d_numbers, d_value = [], []
    for x, v in zip(numbers.split(BACKWARD_TOKENS, 2), value.split(BACKWARD_TOKENS, 2), strict=True):
        d_phi = v.float() @ d_total.transpose(-1, -2) + d_norm[:, :, None]
        phi = x.float()
        if ctx.feature_map in FUSED_MAPS:
            phi, slope = FUSED_MAPS[ctx.feature_map](phi)
            d_phi = d_phi * slope
        d_numbers.append(d_phi.to(x.dtype))
        d_value.append((phi @ d_total).to(v.dtype))
    return torch.cat(d_numbers, 2), torch.cat(d_value, 2), None


def _shapes(numbers: Tensor, value: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    batch, heads, _, features = numbers.shape
    norm = torch.empty((batch, heads, features), dtype=torch.float32, device=value.device)
    return norm.new_empty((batch, heads, features, value.shape[-1])), norm


def _define() -> torch.library.Library | None:
    """Define the operator once per process: the pack may be imported under two names."""
    if hasattr(torch.ops.linearize, "linear_state"):
        return None
    library = torch.library.Library("linearize", "FRAGMENT")
    library.define("linear_state(Tensor numbers, Tensor value, str feature_map) -> (Tensor, Tensor)")
    library.impl("linear_state", state_forward, "CompositeExplicitAutograd")
    torch.library.register_fake("linearize::linear_state", _shapes, lib=library)
    torch.library.register_autograd("linearize::linear_state", _differentiate, setup_context=_save, lib=library)
    return library


_library = _define()  # an operator lives as long as its library
