"""The architectures the pack knows, in the order they are tried. A new one is one file and one entry here."""

from typing import Any

from .base import Host, ModelCall, Site, WeightTarget
from .flux import FluxHost

HOSTS: tuple[Host, ...] = (FluxHost(),)

__all__ = ["HOSTS", "Host", "ModelCall", "Site", "WeightTarget", "find_host"]


def find_host(module: Any) -> Host:
    """Return the host of a diffusion model.

    Raises:
        ValueError: no host knows it; the sentence lists those there are and what the nearest one misses.
    """
    reasons = []
    for host in HOSTS:
        reason = host.mismatch(module)
        if reason is None:
            return host
        reasons.append(reason.text)
    known = ", ".join(host.title for host in HOSTS)
    raise ValueError(
        f"Linearize does not know this model ({type(module).__name__}); it works on: {known}. ({'; '.join(reasons)})"
    )
