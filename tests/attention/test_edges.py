"""The ends of what can be asked for, in every kind alike: no grid, no text, no token, an empty batch, huge numbers."""

import pytest
import torch

from linearize.attention import Segment, TokenLayout, attention, grid_segment
from linearize.attention.checks import MOST_TOKENS
from linearize.attention.kinds.reference import clear_mask, exact_and_linear_masks
from linearize.attention.planning.cost import attention_cost, disc_pairs
from linearize.attention.specs import (
    MOST_FRAMES,
    STABILIZERS,
    ChunkedSpec,
    ClearSpec,
    DenseSpec,
    HybridSpec,
    LinearSpec,
    radius_per_head,
)
from linearize.attention.students.learned import new_maps

HUGE = 10**9  # its square times another's is beyond 64 bits
EDGES = {
    "text only": TokenLayout((Segment("text", 5),)),
    "texts only": TokenLayout((Segment("text", 3), Segment("register", 2), Segment("text", 0))),
    "empty text": TokenLayout((Segment("text", 0), grid_segment("main", 3, 3, 5), Segment("text", 0))),
    "one token": TokenLayout((grid_segment("main", 1, 1, 1),)),
    "nothing": TokenLayout(()),
    "clip": TokenLayout((Segment("text", 3), grid_segment("main", 13, 3, 4))),
}
SPECS = {
    "dense": DenseSpec(),
    "clear": ClearSpec(2),
    "clear in time": ClearSpec(3, 2),
    "clear pooled": ClearSpec(2, down_factor=2),
    "clear proportional": ClearSpec(2, proportional=True),
    "clear by head": radius_per_head((2, 3)),
    "linear": LinearSpec("hedgehog"),
    "linear favor": LinearSpec("favor"),
    **{f"hybrid {each}": HybridSpec(3, "polynomial", stabilizer=each) for each in STABILIZERS},
    "hybrid raw": HybridSpec(2, "elu1"),
    "chunked": ChunkedSpec(2, 1),
    "chunked causal": ChunkedSpec(2, 1, causal=True),
}
HUGE_SPECS = {
    "radius": ClearSpec(HUGE),
    "radius, few frames": ClearSpec(HUGE, 4),
    "radius, own frame": ClearSpec(HUGE, 1),
    "frames": ClearSpec(3, HUGE),
    "both": ClearSpec(HUGE, HUGE),
    "both at their bound": ClearSpec(MOST_TOKENS, MOST_TOKENS),
    "as ratio": ClearSpec(2 * HUGE, HUGE),
    "by head": radius_per_head((3, HUGE), ClearSpec(temporal_radius=2)),
    "rate": HybridSpec(HUGE),
    "chunk": ChunkedSpec(MOST_FRAMES, MOST_FRAMES),
    "overlap": ChunkedSpec(2, MOST_FRAMES, causal=True),
}


def inputs_of(layout, batch=2, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 2, layout.num_tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
            for _ in range(3)]  # fmt: skip


def gradients(output, leaves):
    if not output.requires_grad:  # without a token nothing was computed
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(output.double().square().sum(), leaves)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_is_empty_is_computed_like_the_rest(spec, name, batch, relative_error):
    layout = EDGES[name]
    inputs = inputs_of(layout, batch, grad=True)
    outputs = [attention(*inputs, layout, spec, backend=backend) for backend in ("torch", "reference")]
    assert all(output.shape == inputs[0].shape and output.dtype == torch.float64 for output in outputs)
    pairs = [outputs, *zip(*(gradients(output, inputs) for output in outputs), strict=True)]
    for mine, true in pairs:
        assert mine.isfinite().all() and relative_error(mine, true) < 1e-5 or mine.norm() < 1e-9
    if "text" in name and not layout.grids:
        dense = torch.nn.functional.scaled_dot_product_attention(*inputs)
        assert "proportional" in str(spec) or relative_error(outputs[0], dense) < 1e-9
        assert attention_cost(spec, layout, 2, 16) == attention_cost(DenseSpec(), layout, 2, 16)


@pytest.mark.parametrize("spec", HUGE_SPECS.values(), ids=HUGE_SPECS)
@pytest.mark.parametrize("name", ["clip", "empty text", "text only"])
def test_numbers_whose_squares_are_beyond_64_bits(spec, name, relative_error):
    layout = EDGES[name]
    inputs = inputs_of(layout, grad=True)
    outputs = [attention(*inputs, layout, spec, backend=backend) for backend in ("torch", "reference")]
    assert relative_error(*outputs) < 1e-5
    for mine, true in zip(*(gradients(output, inputs) for output in outputs), strict=True):
        assert relative_error(mine, true) < 1e-4
    if isinstance(spec, ClearSpec):
        mask = clear_mask(layout, spec)
    elif isinstance(spec, HybridSpec | ChunkedSpec):
        mask = exact_and_linear_masks(layout, spec)[0]
    else:
        return
    assert attention_cost(spec, layout, 3, 16).pairs == 3 * mask.sum()


def test_a_huge_radius_is_one_that_covers_the_grid():
    """In whole numbers: of four frames with a radius in time of 3, a plane is seen as a whole or not at all."""
    grid = (4, 3, 5)
    assert disc_pairs(grid, HUGE) == disc_pairs(grid, HUGE, HUGE) == 60 * 60
    assert disc_pairs(grid, HUGE, 3) == 60 * 60 - 2 * 15 * 15
    assert disc_pairs(grid, 2, HUGE) == disc_pairs(grid, 2)


@pytest.mark.parametrize("spec", [LinearSpec("hedgehog"), HybridSpec(2), ChunkedSpec(2, 1), ClearSpec(2)], ids=str)
def test_an_empty_batch_has_gradients_of_zero_for_what_is_learned(spec):
    layout = EDGES["clip"]
    maps = None if isinstance(spec, ClearSpec) else new_maps(spec, 2, 16)
    leaves = inputs_of(layout, 0, grad=True)
    output = attention(*leaves, layout, spec, maps=maps, backend="torch")
    parameters = [] if maps is None else [each for pair in maps for each in pair.parameters()]
    found = torch.autograd.grad(output.sum(), [*leaves, *parameters], allow_unused=True)
    assert all(each is None or not each.any() for each in found)
