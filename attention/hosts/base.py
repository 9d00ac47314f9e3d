"""What the pack needs to know about an architecture: its sites, and the token layout of a call.

A host recognises a model by structure, never by class, so that quantised and wrapped modules are recognised too. It
computes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..layout import Reason, TokenLayout


@dataclass(frozen=True, slots=True)
class Site:
    """One self-attention of a model: a stable id such as `single.17`, and its sizes."""

    id: str
    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where a tensor in the diffusers naming belongs in a host's own, possibly fused, parameter.

    Args:
        key: the host's parameter, counted from the diffusion model, such as `double_blocks.0.img_attn.qkv.weight`.
        start: first row of the parameter that the tensor stands for.
        shape: of the tensor; it takes `shape[0]` rows.
    """

    key: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One forward of the diffusion model as the host application calls it."""

    module: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, name: str) -> Any:
        """Return an argument given by position or by name, else None."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


class Host(Protocol):
    """An architecture. One instance per architecture; it holds no state."""

    name: str
    title: str
    default_text_tokens: int

    def mismatch(self, module: Any) -> Reason | None:
        """Return why `module` is not of this architecture, or None if it is."""
        ...

    def sites(self, module: Any) -> tuple[Site, ...]:
        """Return the self-attention sites in the order they run."""
        ...

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """Return the tokens of every self-attention of this forward, or why they cannot be told."""
        ...

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Return the layout for a picture or clip of this many pixels and frames, before anything runs."""
        ...

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return, by diffusers name, where the projections of the sites lie; empty if nobody publishes any."""
        ...

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        """Return the site of each attention module, by its diffusers name such as `transformer_blocks.3.attn`."""
        ...

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """Return the names of norm weights, in the order of the sites, that tell one base model from another."""
        ...

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        """Return the site that issues a self-attention call with these transformer options; None for other calls."""
        ...


def missing_attributes(module: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """Return those of the dotted attribute paths that `module` lacks; numbers index into lists."""
    return tuple(path for path in paths if not _has(module, path))


def _has(module: Any, path: str) -> bool:
    for part in path.split("."):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError, KeyError, TypeError):
            return False
    return True
