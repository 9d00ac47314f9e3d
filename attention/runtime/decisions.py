"""What runs at one attention call: the user's settings, the facts of the call, and the decision.

Decisions depend on shapes and the noise level only. Nothing runs here; `attention/runtime/run_site.py` acts on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..hosts import Host
from ..hosts.site_hooks import current_block
from ..layout import Reason, TokenLayout
from ..planning.break_even import AUTO_TOKENS
from ..plans import SiteMeasured
from ..site_call import HostCall
from ..specs import SiteSpec
from .backends import AUTO, Backend, CallShape, choose_backend
from .joined_tokens import JoinedTokens

Percents = tuple[float, float]
Half = tuple[int, ...]  # the parts of the guidance in one forward: 0 is the prompt, 1 the negative prompt
OUT_OF_MEMORY = "memory"  # code of a failure for lack of memory
SIGMA_TOLERANCE = 1e-5  # noise levels are float32; what is computed from them rounds differently


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """What a node asked for at a site.

    Args:
        spec: kind and parameters.
        backend: `auto` or a name.
        percents: (start, end) of the part of sampling in which the spec runs, from 0 to 1; None is always.
        min_tokens: calls with fewer tokens stay dense; AUTO_TOKENS stands for the number that pays on the device.
        trained: the site's weights were distilled for the spec, so it ignores `percents` and `min_tokens`, and a
            fall-back to dense is named as such.
        origin: the file those weights are from, for the record.
        measured: what was measured of the spec, for reports.
    """

    spec: SiteSpec
    backend: str = AUTO
    percents: Percents | None = None
    min_tokens: int = 0
    trained: bool = False
    origin: str = ""
    measured: SiteMeasured | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ForwardFacts:
    """What is known of one forward.

    Args:
        layout: its tokens, or why they cannot be told.
        outside: the parts of sampling that it lies outside of.
        half: the parts of the guidance that it holds; empty where the host application does not say.
        break_even: by kind, the fewest tokens that `min_tokens = AUTO_TOKENS` runs it at.
        masks: by identity, the masks seen so far and whether they hide nothing; reading a mask waits for the device,
            and the blocks of one forward share theirs.
        joined: what patches of other nodes join to the text of this forward while it runs.
    """

    layout: TokenLayout | Reason
    outside: frozenset[Percents] = frozenset()
    half: Half = ()
    break_even: Mapping[str, int] = field(default_factory=dict, compare=False)
    masks: dict[int, tuple[Tensor, bool]] = field(default_factory=dict, compare=False)
    joined: JoinedTokens = field(default_factory=JoinedTokens, compare=False)

    def site_of(self, host: Host, options: Mapping[str, Any], num_tokens: int) -> str | None:
        """Return the site that issues a call of so many tokens, or None for calls that belong to no site."""
        site = host.site_of(options)
        if site is None:
            return None
        site = current_block() or site  # another node may run several blocks under the name of one
        if isinstance(self.layout, Reason):
            return site
        return host.site_among(site, self.layout, num_tokens)

    def layout_at(self, host: Host, site: str) -> TokenLayout | Reason:
        """Return the tokens of a site's call."""
        if isinstance(self.layout, Reason):
            return self.layout
        return self.joined.added_to(host.site_layout(site, self.layout))

    def hides_nothing(self, mask: Tensor) -> bool:
        """Return whether every query sees every key under `mask`."""
        if id(mask) not in self.masks:
            visible = mask if mask.dtype == torch.bool else mask == 0
            self.masks[id(mask)] = mask, bool(visible.all())
        return self.masks[id(mask)][1]


def left_to_host(settings: SiteSettings, facts: ForwardFacts, num_tokens: int) -> Reason | None:
    """Return the user's own setting that keeps this call dense, if one does."""
    if settings.trained:
        return None
    if settings.percents in facts.outside:
        return Reason("sigma", "outside start_percent to end_percent")
    if settings.min_tokens == AUTO_TOKENS:
        kind = settings.spec.kind
        least = facts.break_even.get(kind, 0)
        if num_tokens >= least:
            return None
        why = f"below {least:,} {kind} attention was never faster here (min_tokens 0 runs it all the same)"
        return Reason("break_even", f"{num_tokens:,} tokens: {why}")
    if num_tokens < settings.min_tokens:
        return Reason("min_tokens", f"{num_tokens} tokens, below min_tokens = {settings.min_tokens}")
    return None


def is_within(sigma: float, highest: float, lowest: float) -> bool:
    """Return whether a noise level lies between two others, the bounds themselves included."""
    return lowest * (1 - SIGMA_TOLERANCE) <= sigma <= highest * (1 + SIGMA_TOLERANCE)


def backend_for(
    settings: SiteSettings, facts: ForwardFacts, call: HostCall
) -> tuple[Backend, CallShape, tuple[Reason, ...]] | Reason:
    """Return the backend of a call, what it is told, and why others were passed over; or why the call stays dense."""
    # cheap questions come first
    if isinstance(call.layout, Reason):
        return call.layout
    if call.num_keys != call.shape[2]:
        return Reason("split", "the model splits this self-attention into calls with some of the queries each")
    mismatch = call.layout.mismatch(call.shape[2])
    if mismatch is not None:
        return mismatch
    if call.mask is not None and not facts.hides_nothing(call.mask):
        return Reason("mask", "an attention mask is given, which only dense attention can honour")
    query, needs_grad = call.inputs[0], torch.is_grad_enabled()  # feature maps may learn where the inputs do not
    shape = CallShape(settings.spec, call.layout, call.shape, query.dtype, query.device, needs_grad)
    backend, reasons = choose_backend(shape, settings.backend)
    if backend is not None:
        return backend, shape, reasons
    codes = {reason.code for reason in reasons}
    return Reason(codes.pop() if len(codes) == 1 else "backend", "; ".join(map(str, reasons)))


def why_failed(backend: str, error: Exception) -> Reason:
    """Return one sentence for a failure, without the numbers that would make each one look new."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Reason(OUT_OF_MEMORY, f"backend {backend} ran out of memory")
    first = next(iter(str(error).splitlines()), "")
    # some devices raise an error of no type of its own
    code = OUT_OF_MEMORY if "out of memory" in first else "failed"
    return Reason(code, f"backend {backend} failed: {type(error).__name__}: {first}"[:200])
