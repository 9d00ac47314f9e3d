"""Linear keys on the raw scale: of maps without parameters, and of stabilizer "common", they count like exp(s)."""

import math

import pytest
import torch
import torch.nn.functional as F

from linearize.attention import Segment, TokenLayout, grid_segment, reference_attention
from linearize.attention.kinds import linear as linear_module
from linearize.attention.kinds.feature_maps import MAPS, Favor, orthogonal_directions
from linearize.attention.kinds.linear import NOTHING, TORCH, RawState
from linearize.attention.kinds.mapped import mapped_attention
from linearize.attention.specs import STABILIZERS, ChunkedSpec, HybridSpec, LinearSpec
from linearize.attention.students.learned import new_maps

PARAMETERLESS = [name for name in MAPS if MAPS[name].is_exponential]
LAYOUTS = {
    "clip": TokenLayout((grid_segment("main", 5, 3, 3), Segment("text", 4))),
    "two grids": TokenLayout((Segment("text", 1), grid_segment("main", 3, 2, 3), grid_segment("reference", 2, 2, 2))),
    "no text": TokenLayout((grid_segment("main", 1, 3, 11),)),
}
SPECS = {
    "linear": LinearSpec(),
    "hybrid": HybridSpec(2),
    "hybrid 1000": HybridSpec(1000),
    "chunked": ChunkedSpec(2, 1),
    "chunked causal": ChunkedSpec(2, 1, causal=True),
}
PICTURE = TokenLayout((grid_segment("main", 1, 16, 32),))


def tensors(layout, size=8, heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, layout.num_tokens, size)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def with_norm(tensor, norm):
    return tensor / tensor.norm(dim=-1, keepdim=True) * norm


def maps_of(name, heads=2, size=8):
    return new_maps(LinearSpec(name), heads, size)


@pytest.mark.parametrize("name", PARAMETERLESS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scale", [None, 1.3, -0.4])
def test_results_and_gradients_equal_the_reference(name, spec, layout, scale, relative_error, monkeypatch):
    monkeypatch.setattr(linear_module, "CHUNK_VALUES", 1)
    monkeypatch.setattr(linear_module, "MIN_CHUNK", 5)  # each computed again
    maps, grad = maps_of(name), tensors(layout, seed=3)[0]
    inputs = [tensor.requires_grad_() for tensor in tensors(layout)]
    output = mapped_attention(*inputs, layout, spec, maps, scale=scale)
    truth = reference_attention(*inputs, layout, spec, maps=maps, scale=scale)
    assert relative_error(output, truth) < 1e-10
    for mine, true in zip(*(torch.autograd.grad(each, inputs, grad) for each in (output, truth)), strict=True):
        assert relative_error(mine, true) < 1e-8


@pytest.mark.parametrize("name", PARAMETERLESS)
def test_the_definition_in_plain_numbers(name, relative_error):
    """Without logs and without a maximum, as a formula on paper."""
    layout, spec, maps = LAYOUTS["no text"], HybridSpec(3), maps_of(name)
    query, key, value = tensors(layout)
    exact = torch.arange(layout.num_tokens) % 3 == 0
    weights = (query @ key.transpose(-1, -2) * 8**-0.5).exp() * exact
    weights = weights + maps[0](query) @ maps[1](key).transpose(-1, -2) * ~exact
    truth = weights / weights.sum(-1, keepdim=True) @ value
    assert relative_error(reference_attention(query, key, value, layout, spec, maps=maps), truth) < 1e-12


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("norm", [0.1, 1, 2.8, 5])
def test_weights_sum_to_one_at_any_norm(name, spec, norm):
    for layout in (LAYOUTS["clip"], LAYOUTS["no text"]):
        query, key, value = (with_norm(t, norm * math.sqrt(128)).float() for t in tensors(layout, 128))
        with torch.no_grad():
            output = mapped_attention(query, key, torch.ones_like(value), layout, spec, maps_of(name, 2, 128))
        assert (output - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", PARAMETERLESS)
def test_all_stabilizers_give_the_same(name):
    layout, maps = LAYOUTS["clip"], maps_of(name)
    outputs = [mapped_attention(*tensors(layout), layout, HybridSpec(2, stabilizer=each), maps) for each in STABILIZERS]
    assert len(outputs) == 3 and all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_common_multiplies_a_learned_maps_weights_by_what_max_leaves_out(relative_error):
    layout, maps = LAYOUTS["no text"], maps_of("polynomial")
    query, key, value = tensors(layout)
    key[:, :, ::2] = key[:, :, :1]  # exact keys are equal, so max and lse divide by one factor for all of a query
    query = (
        query
        - (query * key[:, :, :1]).sum(-1, keepdim=True) / key[:, :, :1].square().sum(-1, keepdim=True) * (key[:, :, :1])
    )
    outputs = {
        each: mapped_attention(query, key, value, layout, HybridSpec(2, stabilizer=each), maps) for each in STABILIZERS
    }
    assert relative_error(outputs["common"], outputs["max"]) < 1e-9  # scores are 0, and so is c
    assert relative_error(outputs["lse"], outputs["max"]) > 1e-3


@pytest.mark.parametrize("name", ["elu1", "relu"])
def test_linear_attention_alone_is_the_papers(name, relative_error):
    layout = LAYOUTS["no text"]
    query, key, value = tensors(layout)
    phi = {"elu1": lambda x: F.elu(x) + 1, "relu": F.relu}[name]
    weights = phi(query) @ phi(key).transpose(-1, -2)
    truth = weights / weights.sum(-1, keepdim=True) @ value
    for scale in (None, 3.0):
        output = mapped_attention(query, key, value, layout, LinearSpec(name), maps_of(name), scale=scale)
        assert relative_error(output, truth) < 1e-9


def test_favor_in_a_hybrid_is_unbiased(relative_error):
    """At norms that its features can follow; the mean of several draws is much closer than one."""
    query, key, value = (tensor[:1] for tensor in tensors(PICTURE, 128, 2, torch.float32))
    query, key = (with_norm(tensor, 0.5 * math.sqrt(128)) for tensor in (query, key))
    dense = F.scaled_dot_product_attention(query, key, value)
    dropped = F.scaled_dot_product_attention(query, key[:, :, ::2], value[:, :, ::2])
    outputs = []
    for seed in range(8):
        feature_map = Favor(2, 128)
        feature_map.directions = orthogonal_directions(256, 128, torch.Generator().manual_seed(seed))
        outputs.append(mapped_attention(query, key, value, PICTURE, HybridSpec(2, "favor"), (feature_map, feature_map)))
    assert all(relative_error(each, dense) < 0.9 * relative_error(dropped, dense) for each in outputs)
    assert relative_error(sum(outputs) / 8, dense) < 0.3 * relative_error(dropped, dense)


@pytest.mark.parametrize("name", PARAMETERLESS)
def test_large_scores_leave_a_hybrid_close_to_dense_attention(name, relative_error):
    """Queries and keys have much in common, so scores are about 20, and what differs is in values too.

    Linear keys that do not lose the factor exp(-c) have errors of 0.242 (favor), 0.078 (elu1) and 0.077 (relu) here.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tokens):
        return torch.randn((1, 4, tokens, 128), generator=generator)

    common = with_norm(random(1), math.sqrt(18 * math.sqrt(128)))
    query, key = common + random(512) * 0.7, common + random(512) * 0.7
    value = key - common + random(1)
    assert 19 < (query @ key.transpose(-1, -2) * 128**-0.5).amax(-1).mean() < 23
    dense = F.scaled_dot_product_attention(query, key, value)
    output = mapped_attention(query, key, value, PICTURE, HybridSpec(2, name), maps_of(name, 4, 128))
    assert relative_error(output, dense) < 0.055


@pytest.mark.parametrize("name", [*PARAMETERLESS, "polynomial"])
def test_states_of_different_size_add_up(name, relative_error):
    """The keys of one part are larger, so that its sums are e^40 of the other's, and more than fp32 holds."""
    layout, (_, phi_k) = LAYOUTS["no text"], maps_of(name)
    _, key, value = tensors(layout)
    key[:, :, 11:] *= 12
    options = {"scale": 3.0, "stabilizer": "common"}
    parts = [TORCH.summarise(key[:, :, part], value[:, :, part], phi_k, **options) for part in
             (slice(0, 11), slice(11, 12), slice(12, 12), slice(12, 33))]  # fmt: skip
    whole = TORCH.summarise(key, value, phi_k, **options)
    for order in (parts, parts[::-1]):
        total = sum(order[1:], order[0])
        assert isinstance(total, RawState)
        assert relative_error(total.mean, whole.mean) < 1e-12
        assert relative_error(total.log_norm, whole.log_norm) < 1e-12
    assert (parts[2].log_norm == NOTHING).all() and (parts[2].mean == 0).all()
    nothing = parts[2] + parts[2]
    assert nothing.mean.isfinite().all() and nothing.log_norm.isfinite().all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_large_float16_inputs_have_finite_gradients(name, spec):
    layout = LAYOUTS["two grids"]
    query, key, value = (tensor.mul(300).half().requires_grad_() for tensor in tensors(layout))
    output = mapped_attention(query, key, value, layout, spec, maps_of(name))
    found = torch.autograd.grad(output.float().square().mean(), [query, key, value])
    assert output.isfinite().all() and all(each.isfinite().all() for each in found)
