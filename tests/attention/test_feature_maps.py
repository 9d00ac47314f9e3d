"""Feature maps: what each promises, its size, and that it is never negative."""

import pytest
import torch

from linearize.attention.feature_maps import MAPS, TINY, Favor, Polynomial, orthogonal_directions
from linearize.attention.specs import FEATURE_MAPS


def test_every_name_has_a_map():
    assert tuple(MAPS) == FEATURE_MAPS


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


@pytest.mark.parametrize("scale", [0.25, 0.35, -0.25])
def test_favor_estimates_the_exponential_without_bias(scale):
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16) * 0.5, torch.randn(1, 1, 1, 16) * 0.5
    truth = (q * k).sum().mul(scale).exp().item()
    root, estimates = abs(scale) ** 0.5, []
    for seed in range(400):
        feature_map = Favor(1, 16, 32)
        feature_map.directions = orthogonal_directions(32, 16, torch.Generator().manual_seed(seed))
        logs = feature_map.logs(q, root if scale > 0 else -root) + feature_map.logs(k, root)
        estimates.append(logs.exp().sum().item())
    mean, error = torch.tensor(estimates).mean().item(), torch.tensor(estimates).std().item() / 20
    assert abs(mean - truth) < 4 * error and error < 0.1 * truth


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
