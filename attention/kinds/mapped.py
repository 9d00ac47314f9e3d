"""Attention with feature maps, as its spec says: linear and hybrid here, chunked in `chunked.py`.

Which keys are exact is decided here and there. An engine does the sums: `linear.py` in PyTorch, `gpu/mapped.py` on
kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import TokenLayout
from ..specs import ChunkedSpec, HybridSpec, LinearSpec, MappedSpec
from .chunked import chunked_attention
from .feature_maps import Maps
from .linear import TORCH, Engine, dense_for_global_queries


def mapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: MappedSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine = TORCH,
) -> Tensor:
    """Return linear, hybrid or chunked attention (see `chunked_attention`).

    Exact keys are the global tokens and, in a hybrid, the tokens of each grid whose index in it `rate` divides
    (0, rate, ...). Rate 1 is dense attention; a rate beyond the grid leaves its first token. Other tokens are linear
    keys. Global queries see everything exactly.

    Shapes:
        query, key, value: (B, H, N, D), any strides, N = layout.num_tokens. Output: (B, H, N, D), contiguous.

    Args:
        maps: phi_q and phi_k of the site.
        scale: factor on q . k; None is 1 / sqrt(D).
        engine: computes states, and what queries make of them.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors.

    Notes:
        Gradients for query, key, value and the maps, through the stabilizer too.

    Source: Attention Surgery (arXiv 2509.24899), equation of section 3; the other stabilizers and the global tokens
        are ours.
    """
    if isinstance(spec, ChunkedSpec):
        return chunked_attention(query, key, value, layout, spec, maps, scale=scale, engine=engine)
    layout.check(query, key, value)
    output, tokens = dense_for_global_queries(query, key, value, layout, scale), layout.grid_tokens(query.device)
    on_grid = query.index_select(2, tokens)
    on_grid = mapped_queries(on_grid, key, value, layout, spec, maps, scale=scale, engine=engine)
    return output.index_copy(2, tokens, on_grid)


def mapped_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: LinearSpec | HybridSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine = TORCH,
) -> Tensor:
    """Return linear or hybrid attention of some queries alone; training draws a few of each call.

    Shapes:
        query: (B, H, M, D), of tokens on a grid. key, value: (B, H, N, D). Output: (B, H, M, D).
    """
    exact, linear = split_tokens(layout, spec.rate, query.device)
    if not len(linear):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    (phi_q, phi_k), options = maps, {"scale": scale, "stabilizer": spec.stabilizer}
    state = engine.summarise(key.index_select(2, linear), value.index_select(2, linear), phi_k, **options)
    return engine.mix(query, key.index_select(2, exact), value.index_select(2, exact), state, phi_q, **options)


def split_tokens(layout: TokenLayout, rate: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the indices of exact and of linear tokens: global ones are exact, and every `rate`-th of each grid."""
    exact = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for start, stop in layout.global_ranges:
        exact[start:stop] = True
    if rate is not None:
        for start, (frames, height, width) in layout.grids:
            exact[start : start + frames * height * width : rate] = True
    return exact.nonzero().flatten().to(device), (~exact).nonzero().flatten().to(device)
