"""Feature maps: what turns a query or a key into features whose products stand for exp(q . k).

A map takes (B, H, N, D) of any float dtype and returns (B, H, N, F) in fp32, never negative, so that a product of two
is a weight. It is applied after the host's norms and rotary embedding, like the scores. Queries and keys have a map
each. A new map is one class under `register`: a name, its number of features, its parameters, its cost, its forward.
Maps without parameters estimate exp(scale q . k) itself, which may be beyond the range of fp32, so they give logs.

Cost is counted in multiply-adds per token and head, as `num_products`.
"""

import math
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..specs import FEATURE_MAPS

LEAST = 1e-12  # of a learned feature
TINY = 1e-30  # of a number whose log is taken


class FeatureMap(nn.Module):
    """Base of all maps. Parameters are raw fp32 tensors of this leaf module, heads first, and 0 until `reset`.

    Args:
        heads, head_dim: H and D of the site.
        feature_dim: F; 0 takes the map's own number.

    Raises:
        ValueError: the map cannot have that many features.
    """

    name: ClassVar[str]
    log_factor: float = 0.0  # of every feature; kernels that compute the map leave it out
    is_exponential: ClassVar[bool] = False  # products estimate exp(scale q . k) itself; others learn what they match

    def __init__(self, heads: int, head_dim: int, feature_dim: int = 0) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.num_features = self.features(head_dim, feature_dim)

    @classmethod
    def features(cls, head_dim: int, feature_dim: int = 0) -> int:
        """Return F for a head size; without parameters of its own a map has one feature per number of the head."""
        if feature_dim not in (0, head_dim):
            raise ValueError(
                f"feature map {cls.name} has {head_dim} features here, so feature_dim is 0, got {feature_dim}"
            )
        return head_dim

    @classmethod
    def num_products(cls, head_dim: int, feature_dim: int = 0) -> int:
        """Return the multiply-adds of one token and head."""
        return 0

    def reset(self, generator: torch.Generator) -> None:
        """Draw initial parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, H, N, F) of (B, H, N, D): in fp32, or in float64 for float64.

        Features that are learned are at least LEAST, as in LoLCATs. Without a bound, attention whose keys are all
        linear returns less than a mean of values, or nothing, to a query whose features meet none of the keys'.
        """
        features = self.map(_wide(x))
        return features if self.is_exponential else features.clamp_min(LEAST)

    def logs(self, x: Tensor, root: float) -> Tensor:
        """Return the logs of the features, finite, in the dtypes of `forward`.

        Args:
            root: the factor on x that makes q . k the score: queries and keys have the square root of its scale each.
                Maps that do not know the scale ignore it.
        """
        return self.log_map(_wide(x), root)

    def map(self, x: Tensor) -> Tensor:
        """Return the features of fp32 or float64 numbers; parameters may lie on another device."""
        raise NotImplementedError

    def log_map(self, x: Tensor, root: float) -> Tensor:
        """Return the logs of the features of fp32 or float64 numbers."""
        return self.map(x).clamp_min(LEAST).log()


Registered = TypeVar("Registered", bound=FeatureMap)
MAPS: dict[str, type[FeatureMap]] = FEATURE_MAPS  # the same table, as what it holds


def register(feature_map: type[Registered]) -> type[Registered]:
    """Let specs name a map; a decorator of its class. Names are for ever, like those of kinds."""
    MAPS[feature_map.name] = feature_map
    return feature_map


class Exponential(FeatureMap):
    """Base of the maps without parameters, which are made of their logs."""

    is_exponential = True

    def map(self, x: Tensor) -> Tensor:
        """Return the features for scale 1 / sqrt(D); beyond the range of the dtype they are 0 or infinite."""
        return self.log_map(x, self.head_dim**-0.25).exp()


class Elementwise(Exponential):
    """Base of maps of each number alone, divided by sqrt(D): products are about as large as exp(0), at any scale."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int = 0) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.log_factor = -math.log(head_dim) / 2


@register
class Elu1(Elementwise):
    """(1 + elu(x)) / sqrt(D); the paper does not divide, which changes nothing where all keys are linear.

    Source: Katharopoulos et al., Transformers are RNNs (arXiv 2006.16236).
    """

    name = "elu1"

    def log_map(self, x: Tensor, root: float) -> Tensor:
        return torch.where(x < 0, x, x.clamp_min(0).log1p()) + self.log_factor


@register
class Relu(Elementwise):
    """max(x, 0) / sqrt(D), and at least 1e-30 / sqrt(D): a token without positive numbers has next to no weight.

    Performers take the same of random projections, and add 0.001 to it; here are neither.

    Source: Choromanski et al., Rethinking Attention with Performers (arXiv 2009.14794), generalised attention.
    """

    name = "relu"

    def log_map(self, x: Tensor, root: float) -> Tensor:
        return x.clamp_min(TINY).log() + self.log_factor


@register
class Favor(Exponential):
    """Positive orthogonal random features: an unbiased estimate of exp(scale q . k), the same for all models.

    phi(x) = exp(w . x' - |x'|^2 / 2) / sqrt(F) with x' = sqrt(scale) x. Rows of w are orthogonal within blocks of D and
    have the lengths of normal vectors. The paper draws them anew while it trains, stabilises features by their largest
    and adds a small number; ours are drawn once from a fixed seed, are not learned, and stay logs.

    Source: Choromanski et al., Rethinking Attention with Performers (arXiv 2009.14794), FAVOR+.
    """

    name = "favor"
    SEED = 20201
    DRAW = 2  # of the fixed draws the one that is taken; students made with 1 keep it
    directions: Tensor

    def __init__(self, heads: int, head_dim: int, feature_dim: int = 0) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.register_buffer("directions", torch.empty(0), persistent=False)
        self.take_draw(self.DRAW)

    def take_draw(self, draw: int) -> None:
        """Take the directions of a fixed draw: 2, or 1, which was biased."""
        generator = torch.Generator().manual_seed(self.SEED)
        self.directions = orthogonal_directions(self.num_features, self.head_dim, generator, is_uniform=draw > 1)

    @classmethod
    def features(cls, head_dim: int, feature_dim: int = 0) -> int:
        return feature_dim or 2 * head_dim

    @classmethod
    def num_products(cls, head_dim: int, feature_dim: int = 0) -> int:
        return head_dim * cls.features(head_dim, feature_dim)

    def log_map(self, x: Tensor, root: float) -> Tensor:
        x = x * root
        return x @ self.directions.to(x).T - x.square().sum(-1, keepdim=True) / 2 - math.log(self.num_features) / 2


@register
class Hedgehog(FeatureMap):
    """max(softmax(x W), 1e-12) and max(softmax(-x W), 1e-12) side by side: bounded, spiky like softmax weights.

    W is (D, F / 2) per head, without a bias. The Hedgehog's features are plain exponentials; the softmax over them and
    the bound are those of LoLCATs. Theirs have F = D for heads of 128 and start from random numbers or the identity;
    ours have F = 2 D unless told otherwise, and start as the identity where W is square.

    Source: Zhang et al., The Hedgehog & the Porcupine (arXiv 2402.04347), as used in LoLCATs (arXiv 2410.10254).
    """

    name = "hedgehog"

    def __init__(self, heads: int, head_dim: int, feature_dim: int = 0) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, self.num_features // 2))

    @classmethod
    def features(cls, head_dim: int, feature_dim: int = 0) -> int:
        return _even(cls.name, feature_dim) or 2 * head_dim

    @classmethod
    def num_products(cls, head_dim: int, feature_dim: int = 0) -> int:
        return head_dim * cls.features(head_dim, feature_dim) // 2

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        half = self.num_features // 2
        if half == self.head_dim:
            self.weight.copy_(torch.eye(half))
        else:
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.head_dim**-0.5)

    def map(self, x: Tensor) -> Tensor:
        projected = x @ self.weight.to(x)
        return torch.cat((projected.softmax(-1), (-projected).softmax(-1)), dim=-1)


@register
class Polynomial(FeatureMap):
    """Attention Surgery's map: a small network per head, its output in two halves, the second squared.

    Linear(D -> F), SiLU, Linear(F -> F), softplus; F = 2 D, so that both powers have D features: 1,185,792 parameters
    at 12 heads of 128, as the paper's 1.2 M. The paper does not name its non-linearities, nor how it keeps features
    positive; SiLU, softplus and the bound on features are ours. It has higher degrees too; ours is its choice, 2.

    Source: Attention Surgery (arXiv 2509.24899); sizes reconstructed from its parameter and FLOP counts.
    """

    name = "polynomial"
    START = 0.01  # initial size of a feature, so that linear tokens start with little weight

    def __init__(self, heads: int, head_dim: int, feature_dim: int = 0) -> None:
        super().__init__(heads, head_dim, feature_dim)
        width = self.num_features
        self.weight_1 = nn.Parameter(torch.zeros(heads, head_dim, width))
        self.bias_1 = nn.Parameter(torch.zeros(heads, 1, width))
        self.weight_2 = nn.Parameter(torch.zeros(heads, width, width))
        self.bias_2 = nn.Parameter(torch.zeros(heads, 1, width))

    @classmethod
    def features(cls, head_dim: int, feature_dim: int = 0) -> int:
        return _even(cls.name, feature_dim) or 2 * head_dim

    @classmethod
    def num_products(cls, head_dim: int, feature_dim: int = 0) -> int:
        width = cls.features(head_dim, feature_dim)
        return head_dim * width + width * width

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for weight in (self.weight_1, self.weight_2):
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        self.bias_1.zero_()
        self.bias_2.fill_(math.log(math.expm1(self.START)))  # softplus of it is START

    def map(self, x: Tensor) -> Tensor:
        hidden = F.silu(x @ self.weight_1.to(x) + self.bias_1.to(x))
        first, second = F.softplus(hidden @ self.weight_2.to(x) + self.bias_2.to(x)).chunk(2, dim=-1)
        return torch.cat((first, second.square()), dim=-1)


@register
class LinFusion(FeatureMap):
    """1 + elu(x + g(x)) with g = Linear, LayerNorm, LeakyReLU, Linear per head; g starts at 0, so the map as `elu1`.

    Source: Liu et al., LinFusion (arXiv 2409.02097), whose g acts before the query and key projections; ours acts
    after them, head by head, because the pack changes attention only. Its denominators add 1e-4, ours bound the
    features; our LayerNorm has no weights of its own.
    """

    name = "linfusion"

    def __init__(self, heads: int, head_dim: int, feature_dim: int = 0) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.weight_1, self.weight_2 = (nn.Parameter(torch.zeros(heads, head_dim, head_dim)) for _ in range(2))
        self.bias_1, self.bias_2 = (nn.Parameter(torch.zeros(heads, 1, head_dim)) for _ in range(2))

    @classmethod
    def num_products(cls, head_dim: int, feature_dim: int = 0) -> int:
        return 2 * head_dim * head_dim

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self.weight_1.copy_(torch.randn(self.weight_1.shape, generator=generator) * self.head_dim**-0.5)

    def map(self, x: Tensor) -> Tensor:
        hidden = F.layer_norm(x @ self.weight_1.to(x) + self.bias_1.to(x), (self.head_dim,))
        return F.elu(x + F.leaky_relu(hidden) @ self.weight_2.to(x) + self.bias_2.to(x)) + 1


Maps = tuple[FeatureMap, FeatureMap]  # phi_q and phi_k of a site


def orthogonal_directions(number: int, size: int, generator: torch.Generator, *, is_uniform: bool = True) -> Tensor:
    """Return (number, size) vectors, orthogonal in blocks of `size`, each distributed as a normal vector of that size.

    Args:
        is_uniform: False leaves the signs to the factorisation, so that directions favour one side of the space.
    """
    blocks = []
    for _ in range(math.ceil(number / size)):
        directions, rest = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        if is_uniform:
            directions = directions * rest.diagonal().sign()
        lengths = torch.randn(size, size, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        blocks.append(directions.T * lengths)
    return torch.cat(blocks)[:number].float()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _even(name: str, feature_dim: int) -> int:
    if feature_dim % 2:
        raise ValueError(f"feature map {name} has two equal halves, so feature_dim is even, got {feature_dim}")
    return feature_dim
