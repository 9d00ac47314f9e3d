"""What the pack knows of a kind of attention beyond its spec; `runtime/registry.py` has an entry for each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ..layout import Reason, TokenLayout
from ..memory import LongLived
from ..specs import SPECS, HeadGroup, Spec
from .feature_maps import Maps

Shape = tuple[int, int, int, int]  # (B, H, N, D)


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned for a site.

    Args:
        pool: (d, d) pooling weights of `clear`, the same for all heads: what a token counts in its pooled token; None
            means 1 / d^2.
        maps: phi_q and phi_k; None where the kind has none.
        output: (H, D, D) matrices behind the attention, see `output_map.py`; None means none.
        bias: (H, levels) of `foveated`, added to the scores of means; None means 0.
        pool_logits: (H, s, s) of `foveated`, logits of the pooling weights per head: their softmax over the tokens of a
            cell is what a token counts in the mean; None means plain means.
    """

    pool: Tensor | None = None
    maps: Maps | None = None
    output: Tensor | None = None
    bias: Tensor | None = None
    pool_logits: Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether a site has learned nothing."""
        return all(getattr(self, name) is None for name in self.__slots__)

    def of_group(self, group: HeadGroup) -> "Learned":
        """Return what some heads have of what their site has; what belongs to no head in particular stays whole."""
        names, heads = group.spec.learned_shapes(len(group.heads)), list(group.heads)
        bias, logits = (
            tensor[heads] if tensor is not None and name in names else None
            for name, tensor in (("bias", self.bias), ("pool_logits", self.pool_logits))
        )
        return replace(self, bias=bias, pool_logits=logits)


class Compute(Protocol):
    """A function that computes a kind."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        spec: Any,
        learned: Learned,
        *,
        scale: float | None,
        memory: LongLived | None,
    ) -> Tensor:
        """Return (B, H, N, D) in the dtype of `query`.

        Args:
            spec: the kind's own; in `Kernels` also a `HeadSplit` of such.
            learned: has maps where the spec has some.
            scale: factor on q . k; None takes the spec's own.
            memory: keeps tables between calls.
        """
        ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """A kind on Triton.

    Args:
        run: computes all heads of a site at once.
        device_refusal: returns why the kernels cannot run, for a device, a dtype, a head size and whether gradients are
            asked for.
        refusal: returns why they do not take the spec of a site and a shape.
    """

    run: Compute
    device_refusal: Callable[..., Reason | None]
    refusal: Callable[[Any, Shape], Reason | None] = lambda spec, shape: None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of attention.

    Args:
        spec: its class.
        reference: computes it in float64 over explicit masks; shares no code with what it judges.
        run: computes it in PyTorch, some heads of a site or all.
        pairs: returns the (query, key) pairs of one head that meet in a softmax.
        flops: returns the FLOPs of one head for a head size beside those of pairs.
        kernels: computes it on Triton; None where there are none.
        colour: of its bars in the pictures of plans and errors.
    """

    spec: type[Spec]
    reference: Callable[..., Tensor]
    run: Compute
    pairs: Callable[[Any, TokenLayout], int]
    colour: tuple[int, int, int]
    flops: Callable[[Any, TokenLayout, int], int] = lambda spec, layout, head_dim: 0
    kernels: Kernels | None = None


KINDS: dict[str, Kind] = {}  # by name


def register(kind: Kind) -> None:
    """Let plans name a kind, and everything run it. Names are for ever: files and workflows hold them."""
    SPECS[kind.spec.kind] = kind.spec
    KINDS[kind.spec.kind] = kind


def kind_of(spec: Spec) -> Kind:
    """Return the kind of a spec."""
    return KINDS[spec.kind]
