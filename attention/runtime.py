"""The attention override: what runs at each attention call of a sampling run.

`Runtime` holds the plan and settings of one model, `begin_call` notes the token layout once per forward, and
`AttentionOverride` decides call by call. The override never raises into a sampling run: whatever it cannot do goes to
the override that was there before, or to the host's own attention, with the reason logged once and counted. (With
LINEARIZE_STRICT=1, for tests, an unexpected reason raises instead.)

Nothing here imports ComfyUI; `nodes/patching.py` installs it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .backends import AUTO, Call, choose_backend
from .cost import attention_cost
from .decisions import CallFacts, SiteSettings, decide, left_to_host, why_failed
from .hosts import Host, ModelCall
from .layout import Reason, TokenLayout
from .memory import LongLived
from .output_map import map_outputs
from .record import Ran, RunRecord, once
from .site_call import SiteCall, bhnd_shape, to_bhnd
from .site_hooks import current_site, forget_sites
from .specs import DenseSpec
from .student import StudentParameters

RUNTIME_KEY = "linearize_runtime"
CALL_KEY = "linearize_call"
OVERRIDE_KEY = "optimized_attention_override"

_expected: ContextVar[frozenset[str]] = ContextVar("expected declines", default=frozenset())


class UnexpectedDecline(AssertionError):
    """Under LINEARIZE_STRICT=1: a call fell back to dense for a reason that the test did not name."""


@contextlib.contextmanager
def expect_declines(*codes: str) -> Iterator[None]:
    """Allow declines with these reason codes under LINEARIZE_STRICT=1."""
    token = _expected.set(_expected.get() | set(codes))
    try:
        yield
    finally:
        _expected.reset(token)


@dataclass(slots=True)
class Runtime:
    """Plan, settings and state of one patched model. Clones of the model get their own through `copy`.

    Args:
        host: the model's architecture.
        sites: settings per site id; sites that are not named stay dense.
        memory: what outlives a call.
        parameters: what was learned for the sites; shared between clones, never written.
        record: counts of the run in progress, or of the last one.
        status: told the summary when a run ends.
        observe: shown what every site of the host was given and what came out, whoever computed it; for distillation.

    A site whose output was infinite or NaN in one run uses backend torch from then on, where the choice is `auto`.
    """

    host: Host
    sites: Mapping[str, SiteSettings]
    memory: LongLived
    parameters: StudentParameters = field(default_factory=StudentParameters)
    status: Callable[[str], None] | None = None
    observe: Callable[[SiteCall], None] | None = None
    record: RunRecord = field(default_factory=RunRecord)
    _finite: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    _distrusted: frozenset[str] = frozenset()

    def copy(self) -> "Runtime":
        """Return a runtime with the same settings and no shared state."""
        memory = LongLived(self.memory.pause, self.memory.max_bytes)
        return replace(self, memory=memory, record=RunRecord(), _finite={}, _distrusted=frozenset())

    def __deepcopy__(self, _: dict[int, Any]) -> "Runtime":
        return self.copy()

    def merged_over(self, earlier: "Runtime") -> "Runtime":
        """Return the runtime of two nodes in a row: this one's sites, and the earlier one's where it has none.

        Raises:
            ValueError: the runtimes are for different hosts.
        """
        if self.host.name != earlier.host.name:
            raise ValueError(f"settings for {self.host.title} cannot follow settings for {earlier.host.title}")
        parameters = earlier.parameters.without(set(self.sites)).joined(self.parameters)
        statuses = [status for status in (earlier.status, self.status) if status is not None]

        def status(text: str) -> None:
            for each in statuses:
                each(text)

        sites = {**earlier.sites, **self.sites}
        return replace(self.copy(), sites=sites, parameters=parameters, status=status)

    def start_run(self) -> None:
        """Forget the last run, but for the sites that gave infinities or NaN."""
        self._distrusted |= set(self.record.non_finite)
        self.record = RunRecord(sampled=True)
        self._finite.clear()

    def finish_run(self) -> None:
        """Read the flags, free what was kept for the run, tell the node."""
        bad = {site for (site, _), finite in self._finite.items() if not bool(finite)}
        self.record.non_finite = tuple(site for site in self.sites if site in bad)
        self._finite.clear()
        self.memory.clear()
        if self.status is not None:
            try:
                self.status(self.record.summary())
            except Exception as error:  # a closed connection must not cost the finished latent
                once.warning(f"Linearize: the status could not be shown: {error}")

    @torch.compiler.disable  # a compiled model would keep the layout and noise level of its first call
    def begin_call(self, call: ModelCall, options: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the transformer options in which the override finds this forward's layout.

        Raises:
            ValueError: a node asked for one backend, by name, that cannot run this forward.
        """
        forget_sites()
        layout, sigma = self.host.layout(call), None
        if any(settings.sigma_range for settings in self.sites.values()) and options.get("sigmas") is not None:
            sigma = float(options["sigmas"].max())
        if isinstance(layout, TokenLayout):
            self._refuse_wishes(call, layout, sigma)
        return {**options, CALL_KEY: CallFacts(layout, sigma)}

    def _refuse_wishes(self, call: ModelCall, layout: TokenLayout, sigma: float | None) -> None:
        """Stop before a forward computes anything where a wished backend cannot run, rather than ignore the wish."""
        facts, latent = CallFacts(layout, sigma), call.argument(0, "x")
        latent = latent[0] if isinstance(latent, list) else latent  # of a video and its sound
        # on a GPU `auto` is asked too: a backend tests itself now, not while the host records a block's allocations
        on_gpu = isinstance(latent, Tensor) and latent.is_cuda
        wishes = {each for each in self.sites.values() if on_gpu or each.backend != AUTO}
        if not wishes:
            return
        sizes = self.host.sites(call.module)[0]
        for wish in wishes:
            if left_to_host(wish, facts, layout.num_tokens) is not None:
                continue
            shape = (latent.shape[0], sizes.num_heads, layout.num_tokens, sizes.head_dim)
            call_facts = Call(wish.spec, layout, shape, call.dtype or latent.dtype, latent.device)
            backend, reasons = choose_backend(call_facts, wish.backend)
            if backend is None and wish.backend != AUTO and not isinstance(wish.spec, DenseSpec):
                raise ValueError(f"backend {wish.backend} cannot run here: {reasons[0].text}; choose backend {AUTO}")

    def trusted(self, site: str, settings: SiteSettings) -> SiteSettings:
        """Return the settings, with backend torch where `auto` gave infinities or NaN at this site before."""
        if site not in self._distrusted or settings.backend != AUTO:
            return settings
        return replace(settings, backend="torch")

    def note_output(self, site: str, output: Tensor) -> None:
        """Accumulate on the device whether outputs were finite; read once, when the run ends."""
        key = (site, output.device)
        with self.memory.pause():
            finite = torch.isfinite(output.detach()).all()
            self._finite[key] = finite & self._finite[key] if key in self._finite else finite


@dataclass(frozen=True, slots=True)
class AttentionOverride:
    """The callable in the host's override slot. It holds no state but the override that was there before."""

    linearize_override: ClassVar[bool] = True  # recognised by name: the pack may be imported under two names
    previous: Callable[..., Tensor] | None = None

    @torch.compiler.disable  # decisions and counts are made anew at each call, never traced
    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Run one attention call: the plan's spec where possible, else what ran before. Same contract as `func`."""
        options = kwargs.get("transformer_options") or {}
        runtime, facts = options.get(RUNTIME_KEY), options.get(CALL_KEY)
        num_keys, num_queries = (tensor.shape[2 if skip_reshape else 1] for tensor in (k, q))
        flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}

        def host_attention() -> Tensor:
            options = {"mask": mask, "attn_precision": attn_precision, **flags, **kwargs}
            if CALL_KEY in (kwargs.get("transformer_options") or {}):
                # an earlier override of ours further down the chain must not decide the same call again
                options["transformer_options"] = {
                    k: v for k, v in kwargs["transformer_options"].items() if k != CALL_KEY
                }
            if self.previous is not None:
                return self.previous(func, q, k, v, heads, **options)
            return func(q, k, v, heads, **options)

        # a hooked module never issues cross-attention: with fewer queries it splits its own
        if runtime is None or facts is None or (num_keys != num_queries and current_site() is None):
            return host_attention()
        site = facts.site_of(runtime.host, options, num_queries)
        if site is None or (site not in runtime.sites and runtime.observe is None):
            return host_attention()
        facts, shape = facts.at(runtime.host, site), bhnd_shape(q, heads, skip_reshape)
        output = run_site(runtime, site, facts, shape, (q, k, v), mask, skip_reshape, kwargs)
        if output is None:
            output = host_attention()
        elif not skip_output_reshape:
            output = output.transpose(1, 2).reshape(shape[0], shape[2], shape[1] * shape[3])
        if runtime.observe is not None:
            query, key, value = (to_bhnd(tensor, shape[1], shape[3], skip_reshape) for tensor in (q, k, v))
            result = to_bhnd(output, shape[1], shape[3], skip_output_reshape)
            runtime.observe(SiteCall(site, facts.layout, query, key, value, result, mask, kwargs.get("scale")))
        return output


def run_site(
    runtime: Runtime,
    site: str,
    facts: CallFacts,
    shape: tuple[int, int, int, int],
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    skip_reshape: bool,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """Return what the plan makes of one call, (B, H, N, D), or None where the host's attention has to run; count it."""
    if site not in runtime.sites:
        return None
    settings = runtime.sites[site]
    dense_pairs = shape[1] * shape[2] * inputs[1].shape[2 if skip_reshape else 1]
    if isinstance(settings.spec, DenseSpec):
        runtime.record.count_host(site, "dense", dense_pairs, None, chosen=True)
        return None
    choice = left_to_host(settings, facts, shape[2])
    if choice is not None:
        runtime.record.count_host(site, settings.spec.kind, dense_pairs, choice, chosen=True)
        return None
    result = run_planned(runtime, site, settings, facts, shape, inputs, mask, skip_reshape, kwargs)
    if isinstance(result, Reason):
        decline(runtime, site, settings, dense_pairs, result)
        return None
    output, backend, call, has_matrices = result
    cost = attention_cost(settings.spec, call.layout, shape[1], shape[3], has_matrices=has_matrices)
    ran, pairs = Ran(site, settings.spec.kind, backend.name), cost.flops // (4 * shape[3])
    runtime.record.count_run(ran, call.layout, pairs, dense_pairs)
    runtime.note_output(site, output)
    return output


def run_planned(
    runtime: Runtime,
    site: str,
    settings: SiteSettings,
    facts: CallFacts,
    shape: tuple[int, int, int, int],
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    skip_reshape: bool,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, Any, Call, bool] | Reason:
    """Return the output, its backend and call, and whether matrices follow; or why the call has to stay dense.

    Where `auto` chose a backend that then fails, torch is tried too: it computes the same.
    """
    wish, failure = runtime.trusted(site, settings), None
    while True:
        decision = decide(wish, facts, shape, inputs, mask, skip_reshape)
        if isinstance(decision, Reason):
            return failure or decision
        backend, call, passed_over = decision
        runtime.record.note_passed_over(passed_over)
        failure = None
        try:
            query, key, value = (to_bhnd(tensor, shape[1], shape[3], skip_reshape) for tensor in inputs)
            learned, scale = runtime.parameters.learned(site, query.device), kwargs.get("scale")
            output = backend.run(query, key, value, call, scale=scale, learned=learned, memory=runtime.memory)
            if learned.output is not None:
                output = map_outputs(output, call.layout, learned.output)
            return output, backend, call, learned.output is not None
        except Exception as error:  # whatever a device or driver throws must not cost the user a picture
            failure = why_failed(backend.name, error)
        # outside the handler, whose traceback keeps the failed attempt's tensors alive
        if wish.backend != AUTO or backend.name == "torch":
            return failure
        runtime.record.note_passed_over((failure,))
        wish = replace(wish, backend="torch")


def decline(runtime: Runtime, site: str, settings: SiteSettings, dense_pairs: int, reason: Reason) -> None:
    """Count and log a fall-back to dense; raise it where tests ask for that."""
    if os.environ.get("LINEARIZE_STRICT") == "1" and reason.code not in _expected.get():
        raise UnexpectedDecline(f"{site}: {reason.text}")
    if settings.trained:
        reason = Reason(reason.code, f"trained weights on dense attention: {reason.text}")
    runtime.record.count_host(site, settings.spec.kind, dense_pairs, reason, chosen=False)
    once.warning(f"Linearize: dense attention where the plan says {settings.spec.kind}: {reason.text}")


def find_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, dict[str, Any]] | None:
    """Return where a model call carries its transformer options (position or name), and the options."""
    candidates: list[tuple[int | str, Any]] = [*kwargs.items(), *enumerate(args)]
    for place, value in candidates:
        if isinstance(value, dict) and RUNTIME_KEY in value:
            return place, value
    return None


def describe_override(override: Any) -> str:
    """Return a name for another node's override, for people: its function or class and the package it is from."""
    kind = override if hasattr(override, "__qualname__") else type(override)
    package = str(kind.__module__).replace("\\", "/").rsplit("/", 1)[-1]
    return f"another override ({kind.__qualname__.split('.')[0]} of {package})"


def model_call_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Note the layout of a forward for the override; the host application calls this around its diffusion model."""
    found = find_options(args, kwargs)
    if found is None:
        return executor(*args, **kwargs)
    place, options = found
    current = options.get(OVERRIDE_KEY)
    if current is not None and not getattr(current, "linearize_override", False):
        options[RUNTIME_KEY].record.first = describe_override(current)
    # apply_model belongs to the model around the diffusion model, and casts the latent later
    module = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
    dtype = getattr(executor.class_obj, "get_dtype_inference", lambda: None)()
    noted = options[RUNTIME_KEY].begin_call(ModelCall(module, args, kwargs, dtype), options)
    if isinstance(place, int):
        args = (*args[:place], noted, *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: noted}
    return executor(*args, **kwargs)
