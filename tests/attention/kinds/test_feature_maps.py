"""Feature maps: what each promises, its size, and that it is never negative."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linearize.attention.kinds.feature_maps import MAPS, TINY, Favor, Polynomial, orthogonal_directions
from linearize.attention.specs import FEATURE_MAPS


def test_every_name_has_a_map():
    assert tuple(MAPS) == tuple(FEATURE_MAPS) == ("elu1", "relu", "favor", "hedgehog", "polynomial", "linfusion")


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_features_are_finite_and_not_negative(name, dtype):
    feature_map = MAPS[name](3, 16)
    for parameter in feature_map.parameters():
        torch.nn.init.normal_(parameter)
    for size in (1.0, 100.0, 60000.0 if dtype == torch.float16 else 1e6):
        x = (torch.randn(2, 3, 7, 16) * size).clamp(-65000, 65000).to(dtype)
        features = feature_map(x)
        assert features.shape == (2, 3, 7, feature_map.num_features)
        assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert features.min() >= 0 and features.isfinite().all()


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_logs_are_those_of_the_features_and_finite_where_these_are_not(name):
    feature_map = MAPS[name](3, 16)
    for parameter in feature_map.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    logs, features = feature_map.logs(x, 0.5), feature_map(x)
    assert torch.allclose(logs.exp(), features, rtol=1e-9, atol=2 * TINY)
    for size in (1e4, 1e6):
        logs = feature_map.logs(x.float() * size, 0.3)
        assert logs.dtype == torch.float32 and logs.isfinite().all()


@pytest.mark.parametrize("name", ["elu1", "relu", "favor"])
def test_maps_without_parameters_stand_for_the_exponential(name):
    """Of small numbers, whose exponentials are about 1; relu has nothing there."""
    feature_map, x = MAPS[name](1, 64), torch.rand(1, 1, 5, 64) * 1e-3
    products = feature_map(x) @ feature_map(-x).transpose(-1, -2)
    assert feature_map.is_exponential and not list(feature_map.parameters())
    assert (products - (0 if name == "relu" else 1)).abs().max() < 0.2
    assert not any(MAPS[other].is_exponential for other in ("hedgehog", "polynomial", "linfusion"))


def test_elu1_and_relu_are_the_papers_but_for_a_factor():
    x = torch.randn(1, 2, 50, 16) * 3
    assert torch.allclose(MAPS["elu1"](2, 16)(x) * 4, torch.nn.functional.elu(x) + 1, atol=1e-6)
    assert torch.allclose(MAPS["relu"](2, 16)(x) * 4, x.relu(), atol=1e-6)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradients_reach_every_parameter_and_the_input(name):
    feature_map = MAPS[name](2, 8)
    feature_map.reset(torch.Generator().manual_seed(0))
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    (feature_map(x) * torch.randn(1, 2, 5, feature_map.num_features)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    late = {"weight_1", "bias_1"} if name == "linfusion" else set()  # behind a layer that starts at zero
    for parameter_name, parameter in feature_map.named_parameters():
        assert parameter.grad is not None and (parameter.grad.abs().sum() > 0 or parameter_name in late)


def test_polynomial_has_the_papers_number_of_parameters():
    """Attention Surgery, table 7: 1.2 M parameters and 30 GFLOPs at 12,600 tokens for degree 2 and 2 layers."""
    feature_map = Polynomial(12, 128)
    assert feature_map.num_features == 256
    assert sum(parameter.numel() for parameter in feature_map.parameters()) == 1_185_792
    biases = 12 * 2 * 256
    flops = 2 * 12_600 * (12 * Polynomial.num_products(128) + biases)
    assert round(flops / 1e9) == 30


def test_polynomial_squares_its_second_half():
    feature_map = Polynomial(1, 4)
    with torch.no_grad():
        feature_map.bias_2.fill_(2.0)
    features = feature_map(torch.randn(1, 1, 3, 4))
    value = torch.nn.functional.softplus(torch.tensor(2.0))
    assert torch.allclose(features[..., :4], value.expand(1, 1, 3, 4))
    assert torch.allclose(features[..., 4:], value.square().expand(1, 1, 3, 4))


def estimates_of(scale, query, key, draws, **options):
    """Return (draws, pairs) estimates of exp(scale q . k), one of each pair per draw of directions."""
    root, size = abs(scale) ** 0.5, query.shape[-1]
    feature_map, found = Favor(1, size, size), []
    for seed in range(draws):
        feature_map.directions = orthogonal_directions(size, size, torch.Generator().manual_seed(seed), **options)
        logs = feature_map.logs(query, root if scale > 0 else -root) + feature_map.logs(key, root)
        found.append(logs.exp().sum(-1))
    return torch.stack(found).double()


@pytest.mark.parametrize("scale", [0.25, 0.35, -0.25])
def test_favor_estimates_the_exponential_without_bias(scale):
    """Means of 1500 draws, whose errors are about normal; 14 pairs, so that one is beyond 4.5 by chance in 10,000.

    Estimates depend on the sum of query and key. Of ten pairs that is an end of an axis, where directions that favour a
    side show: with the signs that a factorisation happens to give, most of the means are beyond, and one by twice that.
    """
    torch.manual_seed(0)
    ends = torch.cat((torch.eye(5), -torch.eye(5), torch.randn(4, 5))) * 2
    query = torch.randn(14, 5) * 0.4
    key = ends - query if scale > 0 else ends + query  # a negative scale turns the query round
    truth = (query.double() * key.double()).sum(-1).mul(scale).exp()

    def deviations(**options):
        found = estimates_of(scale, query, key, 1500, **options)
        return ((found.mean(0) - truth) / (found.std(0) / 1500**0.5)).abs()

    assert deviations().max() < 4.5
    biased = deviations(is_uniform=False)
    assert biased.max() > 9 and (biased > 4.5).float().mean() > 0.5


def test_favor_directions_are_normal_vectors_one_by_one():
    """Means and second moments of 6000 draws of 3 directions: 42 numbers, one beyond 4.75 by chance in 10,000."""
    draws = torch.stack([orthogonal_directions(3, 4, torch.Generator().manual_seed(seed)) for seed in range(6000)])
    products = torch.einsum("nri,nrj->nrij", draws, draws)
    upper = torch.triu_indices(4, 4)
    samples = torch.cat([draws.flatten(1), (products - torch.eye(4))[:, :, upper[0], upper[1]].flatten(1)], 1).double()
    assert samples.shape[1] == 42
    assert (samples.mean(0) / (samples.std(0) / 6000**0.5)).abs().max() < 4.75


def test_favor_keeps_the_draw_that_students_were_made_with():
    first, second = Favor(1, 16), Favor(1, 16)
    first.take_draw(1)
    assert not torch.equal(first.directions, second.directions)
    normal = torch.randn(16, 16, generator=torch.Generator().manual_seed(20201), dtype=torch.float64)
    factor = torch.linalg.qr(normal)[0].T.float()
    for feature_map in (first, second):
        directions = torch.nn.functional.normalize(feature_map.directions[:16], dim=1)
        assert torch.allclose(directions.abs(), factor.abs(), atol=1e-5)
    assert torch.equal(first.directions.sign()[:16], factor.sign())
    second.take_draw(1)
    assert torch.equal(first.directions, second.directions)


def test_favor_directions_are_orthogonal_and_the_same_for_all():
    directions = Favor(1, 16).directions
    assert torch.equal(directions, Favor(5, 16).directions)
    products = directions[:16] @ directions[:16].T
    assert (products - torch.diag(products.diag())).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "feature_dim", "words"),
    [("elu1", 8, "has 16 features"), ("hedgehog", 7, "even, got 7"), ("polynomial", 33, "even, got 33")],
)
def test_a_wrong_number_of_features_is_one_sentence(name, feature_dim, words):
    with pytest.raises(ValueError, match=words):
        MAPS[name](1, 16, feature_dim)


def test_parameters_follow_the_input_to_its_dtype():
    feature_map = MAPS["hedgehog"](2, 8)
    feature_map.reset(torch.Generator().manual_seed(0))
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    assert (feature_map(x) - feature_map(x.float())).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "per_size"), [("elu1", 1), ("relu", 1), ("favor", 2), ("hedgehog", 2), ("polynomial", 2), ("linfusion", 1)]
)
def test_a_map_has_its_own_number_of_features_and_counts_its_products(name, per_size):
    feature_map, count = MAPS[name](3, 12), FlopCounterMode(display=False)
    tokens = torch.randn(1, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    with count, torch.no_grad():
        features = feature_map(tokens)
    assert features.shape == (1, 3, 5, 12 * per_size)
    assert MAPS[name].features(12) == feature_map.num_features == 12 * per_size
    assert count.get_total_flops() == 2 * 3 * 5 * MAPS[name].num_products(12)


@pytest.mark.parametrize("name", ["favor", "hedgehog", "polynomial"])
def test_a_map_of_another_size_counts_its_products(name):
    feature_map, count = MAPS[name](3, 12, 10), FlopCounterMode(display=False)
    with count, torch.no_grad():
        assert feature_map(torch.ones(1, 3, 5, 12)).shape[-1] == MAPS[name].features(12, 10) == 10
    assert count.get_total_flops() == 2 * 3 * 5 * MAPS[name].num_products(12, 10)


def test_hedgehog_is_two_softmaxes_of_opposite_numbers():
    feature_map = MAPS["hedgehog"](2, 3, 4)
    feature_map.weight.data.copy_(torch.tensor([[[1.0, 0], [0, 1], [0, 0]], [[0.0, 0], [0, 2], [0, 0]]]))
    features = feature_map(torch.tensor([1.0, 3.0, 9.0]).expand(1, 2, 1, 3))
    low, lower = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(6))
    expected = [[low, 1 - low, 1 - low, low], [lower, 1 - lower, 1 - lower, lower]]
    assert torch.allclose(features[0, :, 0], torch.tensor(expected), atol=1e-6)
