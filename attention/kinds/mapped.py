"""The kinds that have feature maps, by their spec: linear, hybrid and chunked attention."""

from torch import Tensor

from ..layout import TokenLayout
from ..specs import HybridSpec, LinearSpec, MappedSpec
from .chunked import chunked_attention
from .feature_maps import Maps
from .hybrid import hybrid_attention
from .linear import Engine, linear_attention, mixed_queries, split_tokens


def mapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: MappedSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Return what `linear_attention`, `hybrid_attention` or `chunked_attention` returns, as the spec says.

    Args:
        engine: who computes states and mixes; None is PyTorch.
    """
    if isinstance(spec, LinearSpec):
        return linear_attention(query, key, value, layout, spec, maps, scale=scale, engine=engine)
    if isinstance(spec, HybridSpec):
        return hybrid_attention(query, key, value, layout, spec, maps, scale=scale, engine=engine)
    return chunked_attention(query, key, value, layout, spec, maps, scale=scale, engine=engine)


def mapped_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: LinearSpec | HybridSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Return linear or hybrid attention of some queries alone; training draws a few of each call.

    Shapes:
        query: (B, H, M, D), of tokens on a grid. key, value: (B, H, N, D). Output: (B, H, M, D).
    """
    rate, stabilizer = (spec.rate, spec.stabilizer) if isinstance(spec, HybridSpec) else (None, "max")
    exact, linear = split_tokens(layout, rate, query.device)
    options = {"scale": scale, "stabilizer": stabilizer, "engine": engine}
    return mixed_queries(query, key, value, exact, linear, maps, **options)
