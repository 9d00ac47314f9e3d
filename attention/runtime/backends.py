"""Which implementation runs a call: each backend says what it cannot do, `auto` takes the first that can.

An explicitly requested backend never falls back to another one; `attention/runtime/run_site.py` sees to that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...kernels import is_interpreted
from ..kinds.feature_maps import MAPS, Maps
from ..kinds.kind import Kernels, Learned, kind_of
from ..kinds.reference import MAX_TOKENS, reference_attention
from ..layout import Reason, TokenLayout
from ..memory import LongLived
from ..specs import HeadSplit, SiteSpec, groups_of
from ..students.learned import new_maps
from . import registry  # noqa: F401 - every kind is known where one runs

AUTO = "auto"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class CallShape:
    """The facts a backend decides on.

    Args:
        spec: what the site runs.
        layout: the tokens of the call.
        shape: (B, H, N, D).
        dtype, device: of the query.
        needs_grad: whether gradients will be asked for.
    """

    spec: SiteSpec
    layout: TokenLayout
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool = False


class Backend(Protocol):
    """One way to compute a site."""

    name: str

    def can_run(self, call: CallShape) -> Reason | None:
        """Return why this backend cannot run the call, or None if it can."""
        ...

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: CallShape,
        *,
        scale: float | None,
        learned: Learned,
        memory: LongLived | None,
    ) -> Tensor:
        """Return (B, H, N, D) in the dtype of `query`."""
        ...


class TorchBackend:
    """PyTorch on any device, memory linear in tokens, differentiable."""

    name = "torch"

    def can_run(self, call: CallShape) -> Reason | None:  # noqa: D102
        return _wrong_input(call)

    def run(self, query, key, value, call, *, scale, learned, memory):  # noqa: ANN001, ANN201, D102
        learned = _with_maps(learned, call)
        order: list[int] = []
        parts: list[Tensor] = []
        for group in groups_of(call.spec, query.shape[1]):
            every_head = len(group.heads) == query.shape[1]
            q, k, v = (query, key, value) if every_head else (_heads(t, group.heads) for t in (query, key, value))
            run, own = kind_of(group.spec).run, learned if every_head else learned.of_group(group)
            parts.append(run(q, k, v, call.layout, group.spec, own, scale=scale, memory=memory))
            order += group.heads
        if len(parts) == 1:
            return parts[0]
        return _heads(torch.cat(parts, dim=1), sorted(range(len(order)), key=order.__getitem__))


def _heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    return tensor.index_select(1, torch.tensor(heads, device=tensor.device))


class TritonBackend:
    """The pack's own kernels: NVIDIA GPUs from Ampere on, AMD where Triton runs; differentiable, deterministic."""

    name = "triton"

    def can_run(self, call: CallShape) -> Reason | None:  # noqa: D102
        unfit = _wrong_input(call) or _without_kernels(call.spec)
        if unfit:
            return unfit
        kernels = _kernels_of(call.spec)
        needs = (call.device, call.dtype, call.shape[3], call.needs_grad)
        return kernels.refusal(call.spec, call.shape) or kernels.device_refusal(*needs)

    def run(self, query, key, value, call, *, scale, learned, memory):  # noqa: ANN001, ANN201, D102
        key, value = key.to(query.dtype), value.to(query.dtype)
        run, learned = _kernels_of(call.spec).run, _with_maps(learned, call)
        return run(query, key, value, call.layout, call.spec, learned, scale=scale, memory=memory)


def _kernels_of(spec: SiteSpec) -> Kernels:
    kernels = kind_of(spec.parts[0]).kernels
    assert kernels is not None, "can_run said so"
    return kernels


def _without_kernels(spec: SiteSpec) -> Reason | None:
    """Return that the kernels do not compute some heads, if there are such."""
    for part in spec.parts:
        if kind_of(part).kernels is None:
            return Reason("kind", f"backend triton does not run kind {part.kind}")
    if len({part.kind for part in spec.parts}) > 1:
        return Reason("kind", "backend triton runs one kind at a site")
    return None


class ReferenceBackend:
    """The float64 oracle, for checking a picture against it; small inputs only."""

    name = "reference"

    def can_run(self, call: CallShape) -> Reason | None:  # noqa: D102
        if call.layout.num_tokens > MAX_TOKENS:
            text = f"the reference holds every pair of tokens and stops at {MAX_TOKENS}, this call has {call.shape[2]}"
            return Reason("tokens", text)
        return _wrong_input(call)

    def run(self, query, key, value, call, *, scale, learned, memory):  # noqa: ANN001, ANN201, D102
        learned = _with_maps(learned, call)
        names = {"pool_weight": "pool", "maps": "maps", "bias": "bias", "pool_logits": "pool_logits"}
        options = {option: getattr(learned, name) for option, name in names.items()}
        return reference_attention(query, key, value, call.layout, call.spec, scale=scale, **options).to(query.dtype)


def _with_maps(learned: Learned, call: CallShape) -> Learned:
    """Return what was learned, with untrained feature maps where the kind needs some and there are none."""
    if not call.spec.has_maps or learned.maps:
        return learned
    return replace(learned, maps=new_maps(call.spec, call.shape[1], call.shape[3]))


TRITON = TritonBackend()
TORCH = TorchBackend()
REFERENCE = ReferenceBackend()
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TRITON, TORCH, REFERENCE)}
AUTO_ORDER: tuple[Backend, ...] = (TRITON, TORCH)


def refused(spec: SiteSpec, num_heads: int, head_dim: int) -> Reason | None:
    """Return why no backend runs a spec at a site of `num_heads` heads of `head_dim`, or None if one does.

    Needs no tokens, so that a plan can be refused before sampling starts.
    """
    try:
        groups = groups_of(spec, num_heads)
        for group in groups:
            if group.spec.has_maps:
                MAPS[group.spec.feature_map].features(head_dim, group.spec.feature_dim)
                if isinstance(spec, HeadSplit):
                    kind = group.spec.kind
                    return Reason("kind", f"kind {kind} runs on all heads of a site, this plan gives it some of them")
    except ValueError as error:
        return Reason("heads", str(error))
    return None


def choose_backend(call: CallShape, wanted: str = AUTO) -> tuple[Backend | None, tuple[Reason, ...]]:
    """Return the backend for a call, and the reasons of those that were passed over.

    The first choice of Triton on a device takes some seconds: its kernels are compiled and tested.

    Args:
        call: the facts.
        wanted: `auto`, or the name of one backend.

    Raises:
        ValueError: no backend has that name.
    """
    if wanted != AUTO and wanted not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join([AUTO, *BACKENDS])}, got {wanted!r}")
    candidates: Sequence[Backend] = AUTO_ORDER if wanted == AUTO else (BACKENDS[wanted],)
    if wanted == AUTO and is_interpreted():
        candidates = (TORCH,)  # Triton's interpreter is for tests, which name their backend
    reasons: dict[Reason, None] = {}
    for backend in candidates:
        reason = backend.can_run(call)
        if reason is None:
            return backend, tuple(reasons)
        reasons[reason] = None  # what is wrong with the input is told once
    return None, tuple(reasons)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    spec: SiteSpec,
    *,
    scale: float | None = None,
    pool_weight: Tensor | None = None,
    maps: Maps | None = None,
    bias: Tensor | None = None,
    pool_logits: Tensor | None = None,
    backend: str = AUTO,
    memory: LongLived | None = None,
) -> Tensor:
    """Return the attention that `spec` describes.

    Shapes:
        query, key, value: (B, H, N, D), any strides. Output: (B, H, N, D).

    Args:
        layout: the tokens, N = layout.num_tokens.
        spec: kind and parameters; `radius_per_head` makes one with a radius for each head.
        scale: factor on q . k; None takes the spec's own, usually 1 / sqrt(D).
        pool_weight: (d, d) weights of pooled tokens; None means 1 / d^2.
        maps: phi_q and phi_k for kinds that have them; None takes untrained ones.
        bias, pool_logits: of the means of `foveated`, as in `foveated_attention`.
        backend: `auto`, `triton`, `torch` or `reference`.
        memory: keeps tables between calls.

    Returns:
        A tensor in the dtype of `query`.

    Raises:
        ValueError: no backend, or not the wanted one, can run the call; the sentence gives its reason.
    """
    tensors = (query, key, value, pool_weight, bias, pool_logits)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    batch, heads, tokens, head_dim = query.shape
    call = CallShape(spec, layout, (batch, heads, tokens, head_dim), query.dtype, query.device, needs_grad)
    chosen, reasons = choose_backend(call, backend)
    if chosen is None:
        raise ValueError("; ".join(map(str, reasons)))
    learned = Learned(pool_weight, maps, bias=bias, pool_logits=pool_logits)
    return chosen.run(query, key, value, call, scale=scale, learned=learned, memory=memory)


def _wrong_input(call: CallShape) -> Reason | None:
    if call.dtype not in FLOATS:
        return Reason("dtype", f"attention needs floating point tensors, got {call.dtype}")
    unfit = refused(call.spec, call.shape[1], call.shape[3])
    return unfit or call.layout.mismatch(call.shape[2])
