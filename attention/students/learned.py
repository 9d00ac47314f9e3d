"""The learned parameters of all sites as one module, which the host application can place and count.

A site has pooling weights, a pair of feature maps, or what means learn, and matrices behind its attention, or nothing.
They are read with a cast at each use, so that they may lie on any device.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..kinds.feature_maps import MAPS, Maps
from ..kinds.kind import Learned
from ..specs import SiteSpec


class PoolParameters(nn.Module):
    """Pooling weights of one site; a leaf, because ComfyUI loads raw parameters of leaf modules only.

    Args:
        pool: (d, d) weights of pooled tokens.
    """

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self.pool = _parameter(pool)


class OutputParameters(nn.Module):
    """The matrices behind one site's attention, a leaf.

    Args:
        weight: (H, D, D), see `output_map.py`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = _parameter(weight)


class MeanParameters(nn.Module):
    """What one site learned for the means of `foveated`, a leaf.

    Args:
        bias: (H, levels), added to the scores of means.
        pool_logits: (H, s, s), logits of pooling weights.
    """

    def __init__(self, bias: Tensor | None, pool_logits: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else _parameter(bias)
        self.pool_logits = None if pool_logits is None else _parameter(pool_logits)


class SiteParameters(nn.Module):
    """What one site has, copies of what was given, without gradients."""

    def __init__(self, learned: Learned) -> None:
        super().__init__()
        pool, maps, output = learned.pool, learned.maps, learned.output
        self.pool = None if pool is None else PoolParameters(pool)
        self.phi_q, self.phi_k = (copy.deepcopy(each).requires_grad_(False) for each in maps) if maps else (None, None)
        self.output = None if output is None else OutputParameters(output)
        has_means = learned.bias is not None or learned.pool_logits is not None
        self.means = MeanParameters(learned.bias, learned.pool_logits) if has_means else None

    def learned(self) -> Learned:
        """Return the parameters as backends take them."""
        return Learned(
            None if self.pool is None else self.pool.pool,
            None if self.phi_q is None or self.phi_k is None else (self.phi_q, self.phi_k),
            None if self.output is None else self.output.weight,
            None if self.means is None else self.means.bias,
            None if self.means is None else self.means.pool_logits,
        )

    def stored(self) -> dict[str, Tensor]:
        """Return the parameters by the names that files give them, counted from the site."""
        named = self.named_parameters()
        return {name.removeprefix("pool.").removeprefix("means."): value.detach() for name, value in named}


class StudentParameters(nn.Module):
    """The parameters of all sites that have some.

    Args:
        learned: what each site has, by its id.
    """

    def __init__(self, learned: Mapping[str, Learned] | None = None) -> None:
        super().__init__()
        given = {site: each for site, each in (learned or {}).items() if not each.is_nothing}
        # the states of optimisers on disk number parameters in this order
        sites = sorted(given, key=lambda site: (given[site].pool is None, given[site].maps is None))
        self.sites = nn.ModuleDict({_key(site): SiteParameters(given[site]) for site in sites})

    def parameters_by_site(self) -> dict[str, SiteParameters]:
        """Return the module of each site that has some."""
        return {_site(key): module for key, module in self.sites.items() if isinstance(module, SiteParameters)}

    def by_site(self) -> dict[str, Learned]:
        """Return what each site has, by its id."""
        return {site: module.learned() for site, module in self.parameters_by_site().items()}

    def learned(self, site: str, device: torch.device) -> Learned:
        """Return what a site has; maps and matrices are cast at each use, the rest lies on `device`."""
        module = dict(self.sites.items()).get(_key(site))
        if not isinstance(module, SiteParameters):
            return Learned()
        found = module.learned()
        pool, bias, logits = (
            None if tensor is None else tensor.to(device) for tensor in (found.pool, found.bias, found.pool_logits)
        )
        return Learned(pool, found.maps, found.output, bias, logits)

    def let_autograd_save(self) -> None:
        """Replace what inference mode made or moved, which autograd refuses to save, by equal tensors."""
        with torch.inference_mode(False):
            for module in self.modules():
                for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    if value.is_inference():
                        copy_of = value.detach().clone()
                        is_learned = isinstance(value, nn.Parameter)
                        setattr(module, name, nn.Parameter(copy_of, value.requires_grad) if is_learned else copy_of)

    def without(self, sites: frozenset[str] | set[str]) -> "StudentParameters":
        """Return the parameters of the other sites."""
        return StudentParameters({site: learned for site, learned in self.by_site().items() if site not in sites})

    def joined(self, other: "StudentParameters") -> "StudentParameters":
        """Return the parameters of both; where both name a site, those of `other`."""
        return StudentParameters(self.by_site() | other.by_site())

    def outputs(self) -> dict[str, Tensor]:
        """Return the matrices behind the attention by site id."""
        found = self.by_site().items()
        return {site: learned.output.detach() for site, learned in found if learned.output is not None}


def new_parameters(spec: SiteSpec, num_heads: int) -> dict[str, Tensor]:
    """Return what a site learns beside maps and matrices, at its start, where it changes nothing."""
    return {
        name: torch.full(shape, 1 / math.prod(shape)) if name == "pool" else torch.zeros(shape)
        for name, shape in spec.learned_shapes(num_heads).items()
    }


def new_maps(spec: SiteSpec, num_heads: int, head_dim: int) -> Maps:
    """Return the untrained phi_q and phi_k of a site; equal calls give equal maps.

    Raises:
        ValueError: the feature map cannot have `feature_dim` features at this head size.
    """
    phi_q, phi_k = empty_maps(spec, num_heads, head_dim)
    for seed, each in enumerate((phi_q, phi_k)):
        each.reset(torch.Generator().manual_seed(seed))
    return phi_q, phi_k


def empty_maps(spec: SiteSpec, num_heads: int, head_dim: int) -> Maps:
    """Return phi_q and phi_k of a site with parameters of 0, to be filled from a file."""
    phi_q, phi_k = (MAPS[spec.feature_map](num_heads, head_dim, spec.feature_dim) for _ in range(2))
    return phi_q, phi_k


def map_shapes(spec: SiteSpec, num_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a map's parameters, by name; no memory is taken for them.

    Raises:
        ValueError: as `new_maps`.
    """
    kind = MAPS[spec.feature_map]
    kind.features(head_dim, spec.feature_dim)
    if kind.is_exponential:  # has no parameters
        return {}
    with torch.device("meta"):
        feature_map = kind(num_heads, head_dim, spec.feature_dim)
    return {name: tuple(parameter.shape) for name, parameter in feature_map.named_parameters()}


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)


def _key(site: str) -> str:
    return site.replace(".", "/")  # module names may not hold dots


def _site(key: str) -> str:
    return key.replace("/", ".")
