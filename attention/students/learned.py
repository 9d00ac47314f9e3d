"""The learned parameters of all sites as one module, which the host application can place and count.

A site has pooling weights, or a pair of feature maps, and matrices behind its attention, or nothing. They are read with
a cast at each use, so that they may lie on any device.
"""

import copy
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
        self.pool = nn.Parameter(pool.detach().clone(), requires_grad=False)


class OutputParameters(nn.Module):
    """The matrices behind one site's attention, a leaf.

    Args:
        weight: (H, D, D), see `output_map.py`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


class SiteParameters(nn.Module):
    """What one site has, copies of what was given, without gradients."""

    def __init__(self, pool: Tensor | None, maps: Maps | None, output: Tensor | None) -> None:
        super().__init__()
        self.pool = None if pool is None else PoolParameters(pool)
        self.phi_q, self.phi_k = (copy.deepcopy(each).requires_grad_(False) for each in maps) if maps else (None, None)
        self.output = None if output is None else OutputParameters(output)

    @property
    def maps(self) -> Maps | None:
        """phi_q and phi_k."""
        return None if self.phi_q is None or self.phi_k is None else (self.phi_q, self.phi_k)

    def stored(self) -> dict[str, Tensor]:
        """Return the parameters by the names that files give them, counted from the site."""
        return {name.removeprefix("pool."): value.detach() for name, value in self.named_parameters()}


class StudentParameters(nn.Module):
    """The parameters of all sites that have some.

    Args:
        pools: (d, d) pooling weights by site id.
        maps: phi_q and phi_k by site id.
        outputs: (H, D, D) matrices behind the attention, by site id.
    """

    def __init__(
        self,
        pools: Mapping[str, Tensor] | None = None,
        maps: Mapping[str, Maps] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        pools, maps, outputs = pools or {}, maps or {}, outputs or {}
        self.sites = nn.ModuleDict(
            {
                _key(site): SiteParameters(pools.get(site), maps.get(site), outputs.get(site))
                for site in dict.fromkeys((*pools, *maps, *outputs))
            }
        )

    def by_site(self) -> dict[str, SiteParameters]:
        """Return the parameters of each site that has some."""
        return {_site(key): found for key, found in self.sites.items() if isinstance(found, SiteParameters)}

    def learned(self, site: str, device: torch.device) -> Learned:
        """Return what a site has; pooling weights lie on `device`, the rest is cast at each use."""
        found = dict(self.sites.items()).get(_key(site))
        if not isinstance(found, SiteParameters):
            return Learned()
        pool = None if found.pool is None else found.pool.pool.to(device)
        return Learned(pool, found.maps, None if found.output is None else found.output.weight)

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
        return StudentParameters(
            {site: pool for site, pool in self.pools().items() if site not in sites},
            {site: pair for site, pair in self.maps().items() if site not in sites},
            {site: output for site, output in self.outputs().items() if site not in sites},
        )

    def joined(self, other: "StudentParameters") -> "StudentParameters":
        """Return the parameters of both; where both name a site, those of `other`."""
        mine = self.without(set(other.by_site()))
        return StudentParameters(
            mine.pools() | other.pools(), mine.maps() | other.maps(), mine.outputs() | other.outputs()
        )

    def pools(self) -> dict[str, Tensor]:
        """Return the pooling weights by site id."""
        found = self.by_site().items()
        return {site: each.pool.pool.detach() for site, each in found if each.pool is not None}

    def maps(self) -> dict[str, Maps]:
        """Return the feature maps by site id."""
        return {site: each.maps for site, each in self.by_site().items() if each.maps is not None}

    def outputs(self) -> dict[str, Tensor]:
        """Return the matrices behind the attention by site id."""
        return {site: each.output.weight.detach() for site, each in self.by_site().items() if each.output is not None}


def new_pool(side: int) -> Tensor:
    """Return pooling weights that average."""
    return torch.full((side, side), 1 / side**2)


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


def _key(site: str) -> str:
    return site.replace(".", "/")  # module names may not hold dots


def _site(key: str) -> str:
    return key.replace("/", ".")
