"""Foveated attention where it could break: numbers without an order, and what heads beside them give."""

import pytest
import torch

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.kinds.foveated import foveated_attention, tiles_of
from linearize.attention.specs import FoveatedSpec

LEVELS = pytest.mark.parametrize("levels", [1, 3])


def layout_of(rows, columns, text=3):
    return TokenLayout.of((Segment("text", text), grid_segment("main", 1, rows, columns)))


def random_qkv(layout, batch, heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, layout.num_tokens, head_dim, generator=generator) for _ in range(3)]


@LEVELS
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", range(3), ids=("query", "key", "value"))
def test_a_number_without_an_order_spoils_its_own_head_alone(place, wrong, levels):
    """Dense attention too gives NaN there; the choice holds tiles once each, and other heads are what they were."""
    layout, spec = layout_of(13, 19), FoveatedSpec(radius=1, top=0.2, levels=levels)
    inputs = random_qkv(layout, batch=2, heads=2, head_dim=8)
    choice, output = tiles_of(*inputs, layout, spec), foveated_attention(*inputs, layout, spec)
    inputs[place][0, 1, 30, 2] = wrong
    spoiled = tiles_of(*inputs, layout, spec)
    kept = torch.tensor([[True, False], [True, True]])
    assert torch.equal(spoiled[kept], choice[kept])
    assert bool(((spoiled.diff(dim=-1) > 0) | (spoiled[..., 1:] < 0)).all())
    assert torch.equal(foveated_attention(*inputs, layout, spec)[kept], output[kept])
