"""The learned parameters of the sites, as a module that the host application can place and count.

A site has pooling weights, or a pair of feature maps, or nothing. They are read with a cast at each use, so that they
may lie on any device.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .feature_maps import MAPS, Maps
from .specs import MappedSpec


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned for a site.

    Args:
        pool: (d, d) weights of pooled tokens; None means 1 / d^2.
        maps: phi_q and phi_k; None where the kind has none.
    """

    pool: Tensor | None = None
    maps: Maps | None = None

    def maps_for(self, spec: MappedSpec, num_heads: int, head_dim: int) -> Maps:
        """Return the maps, untrained ones where there are none."""
        return self.maps or new_maps(spec, num_heads, head_dim)


class PoolParameters(nn.Module):
    """Pooling weights of one site; a leaf, because ComfyUI loads raw parameters of leaf modules only.

    Args:
        pool: (d, d) weights of pooled tokens.
    """

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self.pool = nn.Parameter(pool.detach().clone(), requires_grad=False)


class MapParameters(nn.Module):
    """The feature maps of one site, copies of those given, without gradients."""

    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self.phi_q, self.phi_k = (copy.deepcopy(each).requires_grad_(False) for each in maps)


class StudentParameters(nn.Module):
    """The parameters of all sites that have some.

    Args:
        pools: (d, d) pooling weights by site id.
        maps: phi_q and phi_k by site id.
    """

    def __init__(self, pools: Mapping[str, Tensor] | None = None, maps: Mapping[str, Maps] | None = None) -> None:
        super().__init__()
        sites: dict[str, nn.Module] = {_key(site): PoolParameters(pool) for site, pool in (pools or {}).items()}
        sites |= {_key(site): MapParameters(pair) for site, pair in (maps or {}).items()}
        self.sites = nn.ModuleDict(sites)

    def learned(self, site: str, device: torch.device) -> Learned:
        """Return what a site has; pooling weights lie on `device`, maps cast at each use."""
        found = dict(self.sites.items()).get(_key(site))
        if isinstance(found, PoolParameters):
            return Learned(pool=found.pool.to(device))
        if isinstance(found, MapParameters):
            return Learned(maps=(found.phi_q, found.phi_k))
        return Learned()

    def without(self, sites: frozenset[str] | set[str]) -> "StudentParameters":
        """Return the parameters of the other sites."""
        pools, maps = self.pools(), self.maps()
        return StudentParameters(
            {site: pool for site, pool in pools.items() if site not in sites},
            {site: pair for site, pair in maps.items() if site not in sites},
        )

    def joined(self, other: "StudentParameters") -> "StudentParameters":
        """Return the parameters of both; where both name a site, those of `other`."""
        mine = self.without({_site(key) for key in other.sites})
        return StudentParameters(mine.pools() | other.pools(), mine.maps() | other.maps())

    def pools(self) -> dict[str, Tensor]:
        """Return the pooling weights by site id."""
        return {_site(k): m.pool.detach() for k, m in self.sites.items() if isinstance(m, PoolParameters)}

    def maps(self) -> dict[str, Maps]:
        """Return the feature maps by site id."""
        return {_site(k): (m.phi_q, m.phi_k) for k, m in self.sites.items() if isinstance(m, MapParameters)}


def new_maps(spec: MappedSpec, num_heads: int, head_dim: int) -> Maps:
    """Return the untrained phi_q and phi_k of a site; equal calls give equal maps.

    Raises:
        ValueError: the feature map cannot have `feature_dim` features at this head size.
    """
    phi_q, phi_k = empty_maps(spec, num_heads, head_dim)
    for seed, each in enumerate((phi_q, phi_k)):
        each.reset(torch.Generator().manual_seed(seed))
    return phi_q, phi_k


def empty_maps(spec: MappedSpec, num_heads: int, head_dim: int) -> Maps:
    """Return phi_q and phi_k of a site with parameters of 0, to be filled from a file."""
    phi_q, phi_k = (MAPS[spec.feature_map](num_heads, head_dim, spec.feature_dim) for _ in range(2))
    return phi_q, phi_k


def _key(site: str) -> str:
    return site.replace(".", "/")  # module names may not hold dots


def _site(key: str) -> str:
    return key.replace("/", ".")
