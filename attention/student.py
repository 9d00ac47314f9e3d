"""The learned parameters of a student's sites, as a module that the host application can place and count.

Today these are pooling weights. They are read with a cast at each use, so that they may lie on any device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SiteParameters(nn.Module):
    """The parameters of one site; a leaf, because ComfyUI loads raw parameters of leaf modules only.

    Args:
        pool: (d, d) weights of pooled tokens.
    """

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self.pool = nn.Parameter(pool.detach().clone(), requires_grad=False)


class StudentParameters(nn.Module):
    """The parameters of all sites that have some.

    Args:
        pools: (d, d) pooling weights by site id.
    """

    def __init__(self, pools: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.sites = nn.ModuleDict({_key(site): SiteParameters(pool) for site, pool in pools.items()})

    def pool_weight(self, site: str, device: torch.device) -> Tensor | None:
        """Return the pooling weight of a site on `device`, None where the site has none."""
        found = self._modules_by_site().get(site)
        return None if found is None else found.pool.to(device)

    def without(self, sites: frozenset[str] | set[str]) -> "StudentParameters":
        """Return the parameters of the other sites."""
        return StudentParameters({s: p for s, p in self.pools().items() if s not in sites})

    def pools(self) -> dict[str, Tensor]:
        """Return the pooling weights by site id."""
        return {site: module.pool.detach() for site, module in self._modules_by_site().items()}

    def _modules_by_site(self) -> dict[str, SiteParameters]:
        return {_site(key): module for key, module in self.sites.items() if isinstance(module, SiteParameters)}


def _key(site: str) -> str:
    return site.replace(".", "/")  # module names may not hold dots


def _site(key: str) -> str:
    return key.replace("/", ".")
