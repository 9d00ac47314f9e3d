"""Linear kinds on Triton at the ends of what can be asked for: no grid, an empty batch, features that do not meet."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.gpu.mapped import TRITON
from linearize.attention.kinds.feature_maps import MAPS
from linearize.attention.kinds.mapped import mapped_attention
from linearize.attention.specs import ChunkedSpec, HybridSpec, LinearSpec

mapped_with_triton = partial(mapped_attention, engine=TRITON)

CLIP = TokenLayout.of((grid_segment("main", 5, 3, 4), Segment("text", 3)))


def kind(layout, name, device, dtype, size=16):
    """Return query, key, value, the gradient of the output, and maps with parameters that are no symmetric start."""
    generator = torch.Generator("cpu").manual_seed(1)
    maps = tuple(MAPS[name](2, size) for _ in range(2))
    for parameter in (parameter for each in maps for parameter in each.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.3)
    shape = (1, 2, layout.num_tokens, size)
    tensors = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(4)]
    return tensors[:3], tensors[3], tuple(each.to(device) for each in maps)


@pytest.mark.parametrize("name", ["elu1", "polynomial", "favor"])
@pytest.mark.parametrize("spec", [LinearSpec(), HybridSpec(2), ChunkedSpec(2, 1)], ids=lambda spec: spec.kind)
def test_no_grid_and_an_empty_batch(name, spec, device, exact_dtype, relative_error, tolerance):
    text = TokenLayout((Segment("text", 21), Segment("pad", 0)))
    inputs, _, maps = kind(text, name, device, exact_dtype)
    output = mapped_with_triton(*inputs, text, spec, maps)
    assert relative_error(output, F.scaled_dot_product_attention(*inputs)) < tolerance[exact_dtype]
    inputs, grad, maps = kind(CLIP, name, device, exact_dtype)
    leaves = [tensor[:0].requires_grad_() for tensor in inputs]
    output = mapped_with_triton(*leaves, CLIP, spec, maps)
    found = torch.autograd.grad(output, leaves, grad[:0])
    assert all(each.shape == leaves[0].shape and each.dtype == exact_dtype for each in (output, *found))


@pytest.mark.parametrize("name", ["hedgehog", "polynomial", "linfusion"])
def test_linear_attention_does_not_shrink_where_features_do_not_meet(name, device, relative_error):
    """All queries are alike, all keys too; what one has the other has not, up to the bound on features."""
    layout, generator = TokenLayout((grid_segment("main", 1, 5, 9),)), torch.Generator("cpu").manual_seed(3)
    maps = kind(layout, name, device, torch.float16)[2]
    for parameter_name, parameter in (pair for each in maps for pair in each.named_parameters()):
        parameter.requires_grad_(False)
        if parameter_name == "bias_2":
            parameter.fill_(-200.0 if name == "polynomial" else 0.0)
        if parameter_name == "weight_2":
            parameter.zero_()
    query, key = (torch.randn(1, 2, 1, 16, generator=generator, device="cpu").to(device) * 200 for _ in range(2))
    if name != "hedgehog":
        query, key = -query.abs() - 50, -key.abs() - 50
    assert (maps[0].map(query) * maps[1].map(key)).sum(-1).min() < 1e-12, "or the test is of something else"
    inputs = [each.expand(1, 2, 45, 16).half().requires_grad_() for each in (query, key)]
    value = torch.randn(1, 2, 45, 16, generator=generator, device="cpu").to(device, torch.float16)
    output = mapped_with_triton(*inputs, value, layout, LinearSpec(name), maps)
    assert relative_error(output, value.mean(2, keepdim=True).expand_as(output)) < 4e-3
    assert all(each.isfinite().all() for each in torch.autograd.grad(output.float().square().sum(), inputs))
