"""Scores and what stands for them, for the score loss of Attention Surgery: a few queries, every linear key."""

import torch
from torch import Tensor

from ..attention.layout import TokenLayout
from ..attention.site_call import SiteCall
from ..attention.specs import ChunkedSpec, HybridSpec, MappedSpec
from ..attention.student import Learned

NUM_SCORE_QUERIES = 64
LARGEST = 20.0  # of an exponent; beyond it one pair would be the whole loss


def scores_and_products(call: SiteCall, spec: MappedSpec, learned: Learned, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return, of some queries and their linear keys, s - c and phi_q(q) . phi_k(k), (B, H, M, N) each.

    c is the largest score of the exact keys, as in the attention itself, or of all where none is exact. Pairs that are
    not linear count nothing: their score is -inf and their product 0.
    """
    assert learned.maps is not None and isinstance(call.layout, TokenLayout)
    phi_q, phi_k = learned.maps
    query, key = call.query.index_select(2, rows).float(), call.key.float()
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = query @ key.transpose(-1, -2) * scale
    linear = linear_pairs(call.layout, spec, rows.cpu()).to(scores.device)
    exact = scores.masked_fill(linear, float("-inf"))
    shift = (exact if bool((~linear).any(-1).all()) else scores).amax(-1, keepdim=True)
    products = phi_q(query) @ phi_k(key).transpose(-1, -2)
    relative = (scores - shift).clamp(max=LARGEST)
    return relative.masked_fill(~linear, float("-inf")), products * linear


def linear_pairs(layout: TokenLayout, spec: MappedSpec, rows: Tensor) -> Tensor:
    """Return (M, N) booleans: whether a key is linear for each of the queries `rows`, which lie on a grid."""
    linear = torch.zeros(len(rows), layout.num_tokens, dtype=torch.bool)
    for start, (frames, height, width) in layout.grids:
        stop, cells = start + frames * height * width, height * width
        linear[:, start:stop] = True
        if isinstance(spec, HybridSpec):
            linear[:, start : stop : spec.rate] = False
        if isinstance(spec, ChunkedSpec):
            inside = (rows >= start) & (rows < stop)
            first = (rows - start) // cells // spec.chunk_frames * spec.chunk_frames  # frame where its chunk begins
            frame = (torch.arange(start, stop) - start) // cells
            near = (frame >= first[:, None] - spec.overlap_frames) & (frame < first[:, None] + spec.chunk_frames)
            later = frame >= first[:, None] + spec.chunk_frames
            linear[:, start:stop] &= ~(inside[:, None] & (near | (later if spec.causal else torch.zeros_like(later))))
    return linear
