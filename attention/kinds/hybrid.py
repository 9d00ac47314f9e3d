"""Hybrid attention in PyTorch: every `rate`-th token an exact key, the others linear, one denominator."""

from torch import Tensor

from ..layout import TokenLayout
from ..specs import HybridSpec
from .feature_maps import Maps
from .linear import Engine, mixed_attention, split_tokens


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: HybridSpec,
    maps: Maps,
    *,
    scale: float | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Return hybrid attention.

    Exact keys are the global tokens and, of each grid, the tokens whose index in it `rate` divides (0, rate, ...).
    Rate 1 is dense attention; a rate beyond the grid leaves its first token. Global queries see everything exactly.

    Shapes:
        query, key, value: (B, H, N, D), any strides, N = layout.num_tokens. Output: (B, H, N, D), contiguous.

    Args:
        spec: rate and stabilizer.
        maps: phi_q and phi_k of the site.
        scale: factor on q . k; None is 1 / sqrt(D).
        engine: None is PyTorch.

    Returns:
        The output in the dtype of `query`.

    Raises:
        ValueError: the layout has another number of tokens than the tensors.

    Notes:
        Gradients for query, key, value and the maps, through the stabilizer too.

    Source: Attention Surgery (arXiv 2509.24899), equation of section 3; the other stabilizers and the global tokens
        are ours.
    """
    exact, linear = split_tokens(layout, spec.rate, query.device)
    options = {"scale": scale, "stabilizer": spec.stabilizer, "engine": engine}
    return mixed_attention(query, key, value, layout, exact, linear, maps, **options)
