"""Every kind of attention, one entry each: its spec, what it is, what it costs, who computes it, how it is shown."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..gpu import self_test
from ..gpu.clear import clear_refusal, clear_with_triton
from ..gpu.foveated import foveated_refusal, foveated_with_triton
from ..gpu.mapped import TRITON
from ..kinds.clear import clear_attention
from ..kinds.foveated import foveated_attention, tiles_of
from ..kinds.foveated_reference import foveated_reference
from ..kinds.kind import Kernels, Kind, Learned, register
from ..kinds.linear import TORCH, Engine
from ..kinds.mapped import mapped_attention
from ..kinds.reference import clear_reference, dense_reference, mapped_reference
from ..layout import TokenLayout
from ..memory import LongLived
from ..planning.cost import (
    chunked_flops,
    chunked_pairs,
    clear_pairs,
    dense_pairs,
    exact_pairs,
    foveated_pairs,
    linear_flops,
)
from ..specs import ChunkedSpec, ClearSpec, DenseSpec, FoveatedSpec, HybridSpec, LinearSpec, MappedSpec, SiteSpec


def _dense(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: DenseSpec, learned: Learned,
    *, scale: float | None, memory: LongLived | None,
) -> Tensor:  # fmt: skip
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _clear(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: ClearSpec, learned: Learned,
    *, scale: float | None, memory: LongLived | None,
) -> Tensor:  # fmt: skip
    return clear_attention(query, key, value, layout, spec, scale=scale, pool_weight=learned.pool, memory=memory)


def _clear_on_triton(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: SiteSpec, learned: Learned,
    *, scale: float | None, memory: LongLived | None,
) -> Tensor:  # fmt: skip
    return clear_with_triton(query, key, value, layout, spec, scale=scale, pool_weight=learned.pool, memory=memory)


def _mapped(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: MappedSpec, learned: Learned,
    *, scale: float | None, memory: LongLived | None, engine: Engine,
) -> Tensor:  # fmt: skip
    assert learned.maps is not None
    return mapped_attention(query, key, value, layout, spec, learned.maps, scale=scale, engine=engine)


def _foveated(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: FoveatedSpec, learned: Learned,
    *, scale: float | None, memory: LongLived | None,
) -> Tensor:  # fmt: skip
    options = {"scale": scale, "bias": learned.bias, "pool_logits": learned.pool_logits, "memory": memory}
    return foveated_attention(query, key, value, layout, spec, **options)


def _foveated_on_triton(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: SiteSpec, learned: Learned,
    *, scale: float | None, memory: LongLived | None,
) -> Tensor:  # fmt: skip
    options = {"scale": scale, "bias": learned.bias, "pool_logits": learned.pool_logits, "memory": memory}
    return foveated_with_triton(query, key, value, layout, spec, **options)


def _foveated_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: FoveatedSpec, learned: Learned,
    scale: float | None,
) -> Tensor:  # fmt: skip
    choice = tiles_of(query, key, value, layout, spec, scale=scale)
    return foveated_reference(query, key, value, layout, spec, scale, choice, learned.bias, learned.pool_logits)


ON_TORCH = partial(_mapped, engine=TORCH)
ON_TRITON = Kernels(partial(_mapped, engine=TRITON), self_test.MAPPED.refusal)

register(Kind(DenseSpec, dense_reference, _dense, dense_pairs, colour=(130, 130, 130)))
register(
    Kind(
        ClearSpec,
        clear_reference,
        _clear,
        clear_pairs,
        colour=(46, 134, 171),
        kernels=Kernels(_clear_on_triton, self_test.CLEAR.refusal, clear_refusal),
    )
)
register(
    Kind(
        FoveatedSpec,
        _foveated_reference,
        _foveated,
        foveated_pairs,
        colour=(178, 58, 72),
        kernels=Kernels(_foveated_on_triton, self_test.FOVEATED.refusal, foveated_refusal),
    )
)
register(Kind(LinearSpec, mapped_reference, ON_TORCH, exact_pairs, (214, 123, 40), linear_flops, ON_TRITON))
register(Kind(HybridSpec, mapped_reference, ON_TORCH, exact_pairs, (111, 76, 155), linear_flops, ON_TRITON))
register(Kind(ChunkedSpec, mapped_reference, ON_TORCH, chunked_pairs, (64, 145, 108), chunked_flops, ON_TRITON))
