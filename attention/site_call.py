"""One attention call: as the host issues it, read as tensors (B, H, N, D), and as distillation sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
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
        again: computes the call once more as it was computed, for a stopwatch; None where that cannot be.
    """

    site: str
    layout: TokenLayout | Reason
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    again: Callable[[], Any] | None = None

    def grid_tokens(self) -> Tensor:
        """Return the queries that lie on a grid; global ones see everything and have nothing to learn."""
        assert isinstance(self.layout, TokenLayout)
        return self.layout.grid_tokens(self.query.device)


@dataclass(frozen=True, slots=True, eq=False)
class HostCall:
    """One self-attention call of a site as its host issues it.

    Args:
        site: its id.
        layout: its tokens, or why they cannot be told.
        shape: (B, H, N, D) of the queries.
        inputs: queries, keys and values as the host gives them.
        options: the call's other arguments by name: `mask`, `skip_reshape`, `skip_output_reshape`, `scale` if there is
            one.
    """

    site: str
    layout: TokenLayout | Reason
    shape: tuple[int, int, int, int]
    inputs: tuple[Tensor, Tensor, Tensor]
    options: Mapping[str, Any]

    @property
    def num_keys(self) -> int:
        return self.inputs[1].shape[2 if self.options["skip_reshape"] else 1]

    @property
    def dense_pairs(self) -> int:
        """The pairs of query and key of dense attention, of all heads."""
        return self.shape[1] * self.shape[2] * self.num_keys

    @property
    def mask(self) -> Tensor | None:
        return self.options["mask"]

    @property
    def scale(self) -> float | None:
        """Factor on q . k; None is 1 / sqrt(D)."""
        return self.options.get("scale")

    def bhnd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as (B, H, N, D)."""
        _, heads, _, size = self.shape
        query, key, value = (to_bhnd(each, heads, size, self.options["skip_reshape"]) for each in self.inputs)
        return query, key, value

    def seen(self, output: Tensor, again: Callable[[], Any] | None = None) -> SiteCall:
        """Return what distillation and calibration see, with the output as the host got it."""
        _, heads, _, size = self.shape
        output = to_bhnd(output, heads, size, self.options["skip_output_reshape"])
        return SiteCall(self.site, self.layout, *self.bhnd(), output, self.mask, self.scale, again)


def bhnd_shape(query: Tensor, heads: int, skip_reshape: bool) -> tuple[int, int, int, int]:
    """Return (B, H, N, D) of a query as the host gives it: (B, N, H * D), or with `skip_reshape` (B, H, N, D)."""
    if skip_reshape:
        batch, num_heads, tokens, head_dim = query.shape
        return batch, num_heads, tokens, head_dim
    return query.shape[0], heads, query.shape[1], query.shape[2:].numel() // heads


def to_bhnd(tensor: Tensor, heads: int, head_dim: int, skip_reshape: bool) -> Tensor:
    """Return a host's tensor as (B, H, N, D), a view where heads are not shared."""
    if not skip_reshape:
        tensor = rearrange(tensor.flatten(2), "b n (h d) -> b h n d", d=head_dim)
    if tensor.shape[1] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)  # grouped: several heads share keys and values


def unusable(call: SiteCall) -> Reason | None:
    """Return why nothing can be learned or measured from a call, or None."""
    if isinstance(call.layout, Reason):
        return call.layout
    if not call.layout.grids or not call.query.shape[0]:
        return Reason("grid", "no token lies on a grid, and only those have something to gain")
    if call.mask is not None and not bool((call.mask if call.mask.dtype == torch.bool else call.mask == 0).all()):
        return Reason("mask", "an attention mask hides tokens")
    if call.query.shape[2] != call.key.shape[2]:
        return Reason("split", "the model splits this self-attention into calls with some of the queries each")
    return call.layout.mismatch(call.query.shape[2])
