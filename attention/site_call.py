"""One attention call as tensors (B, H, N, D): how they are read off the host's, and what distillation sees of them."""

from dataclasses import dataclass

from torch import Tensor

from .layout import Reason, TokenLayout


@dataclass(frozen=True, slots=True, eq=False)
class SiteCall:
    """One self-attention call of a model, as its site computed it.

    Args:
        site: its id.
        layout: its tokens, or why they cannot be told.
        query, key, value, output: (B, H, N, D); keys and values shared by several heads are repeated.
        mask: as the host gave it, or None.
        scale: factor on q . k; None is 1 / sqrt(D).
    """

    site: str
    layout: TokenLayout | Reason
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    mask: Tensor | None = None
    scale: float | None = None


def bhnd_shape(query: Tensor, heads: int, skip_reshape: bool) -> tuple[int, int, int, int]:
    """Return (B, H, N, D) of a query as the host gives it: (B, N, H * D), or with `skip_reshape` (B, H, N, D)."""
    if skip_reshape:
        batch, num_heads, tokens, head_dim = query.shape
        return batch, num_heads, tokens, head_dim
    return query.shape[0], heads, query.shape[1], query.shape[2:].numel() // heads


def to_bhnd(tensor: Tensor, heads: int, head_dim: int, skip_reshape: bool) -> Tensor:
    """Return a host's tensor as (B, H, N, D), a view where heads are not shared."""
    if not skip_reshape:
        tensor = tensor.reshape(tensor.shape[0], tensor.shape[1], -1, head_dim).transpose(1, 2)
    if tensor.shape[1] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)  # grouped: several heads share keys and values
