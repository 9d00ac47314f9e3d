"""Attention scores and their estimates, for Attention Surgery's score loss: few queries, all linear keys."""

import torch
from torch import Tensor

from ...attention.kinds.feature_maps import TINY, Maps
from ...attention.kinds.kind import Learned
from ...attention.kinds.linear import is_on_raw_scale, roots
from ...attention.layout import TokenLayout
from ...attention.site_call import SiteCall
from ...attention.specs import ChunkedSpec, MappedSpec

NUM_SCORE_QUERIES = 64
LARGEST = 20.0  # of an exponent; beyond it one pair would be the whole loss
NEVER = float("-inf")


def scores_and_products(call: SiteCall, spec: MappedSpec, learned: Learned, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return, of some queries and their linear keys, s - c and what stands for exp(s - c), (B, H, M, N) each.

    Where both agree, attention is what exact keys alone would make. Pairs that are not linear count nothing:
    their score is -inf and what stands for it is 0.

    Notes:
        c belongs to the query and is what the attention subtracts of exact scores: the largest of them or, with "lse",
        the log of the sum of their exponents; phi_q(q) . phi_k(k) stands for exp(s - c). Where no key is exact, only
        ratios matter, and c is the largest score. On the raw scale phi_q(q) . phi_k(k) exp(-c) stands for exp(s - c);
        c matters not, and is the largest of all there is.
    """
    assert learned.maps is not None and isinstance(call.layout, TokenLayout)
    query, key = call.query.index_select(2, rows).float(), call.key.float()
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = query @ key.transpose(-1, -2) * scale
    exact, linear = (mask.to(scores.device) for mask in exact_and_linear_pairs(call.layout, spec, rows.cpu()))
    if is_on_raw_scale(learned.maps[1], spec.stabilizer):
        logs = _log_products(query, key, learned.maps, call.scale)
        shift = torch.maximum(scores, logs.detach()).masked_fill(~linear, NEVER).amax(-1, keepdim=True)
        relative, products = scores - shift, (logs - shift).masked_fill(~linear, NEVER).exp()
    else:
        seen = scores.masked_fill(~(exact if bool(exact.any(-1).all()) else linear), NEVER)
        shift = seen.logsumexp(-1, keepdim=True) if spec.stabilizer == "lse" else seen.amax(-1, keepdim=True)
        phi_q, phi_k = learned.maps
        relative, products = (scores - shift).clamp(max=LARGEST), phi_q(query) @ phi_k(key).transpose(-1, -2) * linear
    return relative.masked_fill(~linear, NEVER), products


def exact_and_linear_pairs(layout: TokenLayout, spec: MappedSpec, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return two (M, N) booleans of the queries `rows`, which lie on a grid: which keys are exact, and which linear.

    A key that is neither is not seen.
    """
    exact = torch.ones(len(rows), layout.num_tokens, dtype=torch.bool)
    linear = torch.zeros_like(exact)
    for start, (frames, height, width) in layout.grids:
        stop, cells = start + frames * height * width, height * width
        exact[:, start:stop] = False
        if spec.rate is not None:
            exact[:, start : stop : spec.rate] = True
        linear[:, start:stop] = ~exact[:, start:stop]
        if isinstance(spec, ChunkedSpec):
            inside = ((rows >= start) & (rows < stop))[:, None]
            first = (rows - start)[:, None] // cells // spec.chunk_frames * spec.chunk_frames  # of the query's chunk
            frame = (torch.arange(start, stop) - start) // cells
            later = frame >= first + spec.chunk_frames
            near = (frame >= first - spec.overlap_frames) & ~later
            exact[:, start:stop] = inside & near
            linear[:, start:stop] = ~(inside & (near | later)) if spec.causal else ~(inside & near)
    return exact, linear


def _log_products(query: Tensor, key: Tensor, maps: Maps, scale: float | None) -> Tensor:
    """Return log phi_q(q) . phi_k(k) of all pairs, whose products may be beyond the range of fp32."""
    root_q, root_k = roots(scale, query.shape[-1])
    logs_q, logs_k = maps[0].logs(query, root_q), maps[1].logs(key, root_k)
    top_q, top_k = (each.detach().amax(-1, keepdim=True) for each in (logs_q, logs_k))
    products = (logs_q - top_q).exp() @ (logs_k - top_k).exp().transpose(-1, -2)
    return products.clamp_min(TINY).log() + top_q + top_k.transpose(-1, -2)
