"""Attention Surgery's map with its features raised to other powers: is degree 2 enough?

The pack has degree 2 only. The others exist here alone: as many features, parameters and operations, in as many equal
parts as the degree, part n raised to the power n.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES = (1, 2, 4)


def name_of(degree: int) -> str:
    """Return the name of a map."""
    return f"degree {degree}"


def add_degrees(feature_maps: Any) -> None:
    """Let specs name these maps, in this process only.

    Args:
        feature_maps: the pack's module of this name.
    """
    for degree in DEGREES:
        feature_maps.register(_map_of(feature_maps.Polynomial, degree))


def _map_of(base: Any, degree: int) -> Any:
    """Return the class of a map; degree 2 is the pack's own map."""

    class Degree(base):
        name = name_of(degree)

        def map(self, x: Tensor) -> Tensor:
            hidden = F.silu(x @ self.weight_1.to(x) + self.bias_1.to(x))
            parts = F.softplus(hidden @ self.weight_2.to(x) + self.bias_2.to(x)).chunk(degree, dim=-1)
            return torch.cat([part.pow(power) for power, part in enumerate(parts, 1)], dim=-1)

    return Degree
