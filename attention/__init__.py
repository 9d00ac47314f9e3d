"""Attention with linear cost, as a library: layouts, specs, plans, backends. Never imports ComfyUI.

Sizes: B batch, H heads, N tokens, D head dimension, T text tokens; a grid is (frames, height, width) in tokens. Tensors
are (B, H, N, D).
"""

from .kinds.clear import clear_attention
from .kinds.reference import reference_attention
from .layout import Reason, Segment, TokenLayout, grid_segment
from .planning.cost import attention_cost
from .plans import Plan, select_sites
from .runtime.backends import attention
from .specs import (
    ChunkedSpec,
    ClearSpec,
    DenseSpec,
    FoveatedSpec,
    HeadGroup,
    HeadSplit,
    HybridSpec,
    LinearSpec,
    radius_per_head,
)

__all__ = [
    "ChunkedSpec",
    "ClearSpec",
    "DenseSpec",
    "FoveatedSpec",
    "HeadGroup",
    "HeadSplit",
    "HybridSpec",
    "LinearSpec",
    "Plan",
    "Reason",
    "Segment",
    "TokenLayout",
    "attention",
    "attention_cost",
    "clear_attention",
    "grid_segment",
    "radius_per_head",
    "reference_attention",
    "select_sites",
]
