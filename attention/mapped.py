"""The kinds that have feature maps, by their spec: linear, hybrid and chunked attention."""

from torch import Tensor

from .chunked import chunked_attention
from .feature_maps import Maps
from .hybrid import hybrid_attention
from .layout import TokenLayout
from .linear import Engine, linear_attention
from .specs import HybridSpec, LinearSpec, MappedSpec


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
