"""The plan of one model at work: what runs at each attention call of a sampling run.

`Runtime` holds the plan and settings of one model; `begin_call` notes the token layout once per forward. `run_site.py`
acts call by call; `override.py` calls both. Nothing here raises into a sampling run: what cannot be done is left to the
attention that was there before, with the reason logged once and counted. (With LINEARIZE_STRICT=1, for tests, an
unexpected reason raises instead.)
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..hosts import Host, ModelCall
from ..hosts.site_hooks import KnownModel, forget_running
from ..layout import Reason, TokenLayout
from ..memory import LongLived
from ..planning.break_even import AUTO_TOKENS, least_tokens
from ..planning.report import describe_spec
from ..plans import Plan
from ..site_call import SiteCall
from ..specs import SiteSpec
from ..students.learned import StudentParameters
from ..words import counted
from .backends import AUTO, CallShape, choose_backend
from .decisions import ForwardFacts, Half, Percents, SiteSettings, is_within, left_to_host
from .joined_tokens import watch_joined
from .record import LastRun, RunRecord, once
from .seconds import Ledger, StepClock, StepSize

RUNTIME_KEY = "linearize_runtime"
CALL_KEY = "linearize_call"
HALF_KEY = "cond_or_uncond"  # in the transformer options: which parts of the guidance a forward holds

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
        status: told the summary when a run ends.
        observe: shown what every site of the host was given and what came out, whoever computed it; for distillation.
        core: the host application's own attention.
        percent_to_sigma: turns a share of sampling into a noise level; the model's own, set anew when a run starts.
        record: counts of the run in progress, or of the last one.
        copies: the last run of a clone, for nodes that ask for the last run of the model that was cloned.
        override: ours over another node's, kept between forwards.
        ledger: what is remembered of seconds a step on this machine; None remembers nothing.
        clock: times the run in progress.

    A site whose output was infinite or NaN in one run uses backend torch from then on, where the choice is `auto`.
    """

    host: Host
    sites: Mapping[str, SiteSettings]
    memory: LongLived
    parameters: StudentParameters = field(default_factory=StudentParameters)
    status: Callable[[str], None] | None = None
    observe: Callable[[SiteCall], None] | None = None
    core: Callable[..., Tensor] | None = None
    percent_to_sigma: Callable[[float], float] | None = None
    record: RunRecord = field(default_factory=RunRecord)
    copies: LastRun = field(default_factory=LastRun)
    override: Any = None
    ledger: Ledger | None = None
    clock: StepClock = field(default_factory=StepClock)
    _size: StepSize | None = None
    _told: tuple[LastRun, ...] = ()
    _known: dict[Any, KnownModel] = field(default_factory=dict)
    _unhook: dict[Any, Callable[[], None]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _masked: dict[str, set[Half]] = field(default_factory=dict)
    _finite: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    _distrusted: frozenset[str] = frozenset()

    def copy(self) -> "Runtime":
        """Return a runtime with the same settings and no shared state; its runs are told to this one."""
        memory = LongLived(self.memory.pause, self.memory.max_bytes)
        own = {"memory": memory, "record": RunRecord(), "copies": LastRun(), "override": None}
        own |= {"_known": dict(self._known), "_unhook": {}, "_lock": threading.Lock(), "clock": StepClock()}
        return replace(self, **own, _told=(*self._told, self.copies), _masked={}, _finite={}, _distrusted=frozenset())

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
        return replace(self.copy(), sites=sites, parameters=parameters, status=status, _told=())

    def plan(self) -> Plan:
        """Return what the sites run, as a plan."""
        plan = Plan.of_sites(self.host.name, {site: settings.spec for site, settings in self.sites.items()})
        measured = {site: settings.measured for site, settings in self.sites.items() if settings.measured is not None}
        return replace(plan, measured=measured)

    def meet(self, module: Any) -> None:
        """Note the modules of the model that this runtime is put on, before other nodes move them."""
        self._known = {module: KnownModel.of(self.host, module)}

    def start_run(self, percent_to_sigma: Callable[[float], float] | None = None) -> None:
        """Forget the last run, but for the sites that gave infinities or NaN."""
        self._distrusted |= set(self.record.non_finite)
        planned = (site for site, settings in self.sites.items() if not settings.spec.is_dense)
        trained = frozenset(site for site, settings in self.sites.items() if settings.trained)
        self.record = RunRecord(sampled=True, planned=tuple(planned), trained=trained)
        self.clock, self._size = StepClock(), None
        self.percent_to_sigma = percent_to_sigma or self.percent_to_sigma
        self._masked.clear()
        self._finite.clear()

    def finish_run(self) -> None:
        """Read the flags, free what was kept for the run, tell the node, and the models that this is a clone of."""
        bad = {site for (site, _), finite in self._finite.items() if not bool(finite)}
        self.record.non_finite = tuple(site for site in self.sites if site in bad)
        self._finite.clear()
        self.memory.clear()
        self._take_hooks_away()
        self._read_clock()
        for each in self._told:
            each.record = self.record
        if self.status is not None:
            try:
                self.status(self.record.summary())
            except Exception as error:  # a closed connection must not cost the finished latent
                once.warning(f"Linearize: the status could not be shown: {error}")

    def last_record(self) -> tuple[RunRecord, bool]:
        """Return the record of this model's last run, or else of a clone's, and whether it is a clone's.

        Samplers may make clones themselves.
        """
        is_own = self.record.sampled or self.copies.record is None
        return (self.record, False) if is_own or self.copies.record is None else (self.copies.record, True)

    def last_run(self) -> str:
        """Return what the last run of this model did, or else that of a clone, as text."""
        record, is_copy = self.last_record()
        return record.summary() + "\n(a copy of this model was sampled)" * is_copy

    @torch.compiler.disable  # a compiled model would keep the layout and noise level of its first call
    def begin_call(self, call: ModelCall, options: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the transformer options in which the override finds this forward's facts.

        Raises:
            ValueError: a node asked for one backend, by name, that cannot run this forward.
        """
        # some models run what wraps them inside the core's recording of allocations
        with self.memory.pause():
            forget_running()
            self.record.forwards += 1
            self._hook(call.module)
            if torch.is_grad_enabled():
                self.parameters.let_autograd_save()
            layout, half = self.host.layout(call), tuple(options.get(HALF_KEY) or ())
            if self._size is None and isinstance(layout, TokenLayout):
                self._meet_size(call, layout)
            facts = ForwardFacts(layout, self._outside(options), half, self.record.break_even)
            if isinstance(layout, TokenLayout):
                self._check_named_backends(call, facts, layout)
            self.clock.begin_forward(options, self.record.planned_calls)
        return {**watch_joined(options, facts.joined), CALL_KEY: facts}

    def _meet_size(self, call: ModelCall, layout: TokenLayout) -> None:
        """Note, in the first forward of a run, on what its seconds depend, and from how many tokens a kind pays."""
        latent, sizes = call.latent, self._known[call.module].site
        if not isinstance(latent, Tensor):
            return
        where, dtype = latent.device, str(call.dtype or latent.dtype).removeprefix("torch.")
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
        shape = f"{len(self.host.sites(call.module))} x {sizes.num_heads} x {sizes.head_dim}"
        model = f"{self.host.name} {shape}, {dtype} on {name}, torch {torch.__version__}"
        self._size = StepSize(model, layout.num_tokens, latent.shape[0])
        ledger = self.ledger
        self.clock.knows_dense = ledger is None or ledger.dense(self._size) is not None
        autos = {settings.spec for settings in self.sites.values() if settings.min_tokens == AUTO_TOKENS}
        kinds = {spec.kind: words for spec, words in self.described().items() if spec in autos}
        least = {kind: least_tokens(where.type, kind) for kind in kinds}
        self.record.break_even = (
            least
            if ledger is None
            else {kind: ledger.break_even(model, spec, least[kind]) for kind, spec in kinds.items()}
        )

    def described(self) -> dict[SiteSpec, str]:
        """Return each spec that is not dense in words, with the number of its sites: seconds depend on both."""
        sites = Counter(settings.spec for settings in self.sites.values() if not settings.spec.is_dense)
        return {spec: f"{describe_spec(spec)} at {counted(number, 'site')}" for spec, number in sites.items()}

    def _read_clock(self) -> None:
        """Put the run's seconds into the record, and into what is remembered."""
        if self._size is None or not self.record.finished or self.record.finished != self.record.forwards:
            return  # what was cut off inside a forward would count as a step
        planned, dense = self.clock.steps(self.record.planned_calls)
        self.record.seconds, self.record.dense_seconds = planned, dense
        if self.ledger is not None:
            kind, share = " + ".join(sorted(self.described().values())), 1 / self.clock.forwards_a_step()
            a_forward = None if planned is None else planned * share
            self.ledger.note(self._size, kind, a_forward, dense and dense.times(share))
            known = self.ledger.dense(self._size)
            self.record.dense_seconds = dense or (known and known.times(1 / share))

    def _hook(self, module: Any) -> None:
        """Have the model's modules tell what runs, until the run ends; each GPU of several has a model and a thread."""
        with self._lock:
            if module not in self._known:
                self._known[module] = KnownModel.of(self.host, module)
            if module not in self._unhook:
                self._unhook[module] = self._known[module].hook()

    def _take_hooks_away(self) -> None:
        with self._lock:
            if self._unhook:  # what else is known belongs to models that are not used any more
                self._known = {module: self._known[module] for module in self._unhook}
            while self._unhook:
                self._unhook.popitem()[1]()

    def _outside(self, options: Mapping[str, Any]) -> frozenset[Percents]:
        """Return the parts of sampling, of those that a site was given, that this forward lies outside of."""
        parts = {settings.percents for settings in self.sites.values() if settings.percents is not None}
        if not parts or self.percent_to_sigma is None or options.get("sigmas") is None:
            return frozenset()
        sigma = float(options["sigmas"].max())
        return frozenset(part for part in parts if not is_within(sigma, *map(self.percent_to_sigma, part)))

    def _check_named_backends(self, call: ModelCall, facts: ForwardFacts, layout: TokenLayout) -> None:
        """Raise, before a forward computes anything, if a backend that the user named cannot run it."""
        latent = call.latent
        # on a GPU `auto` is asked too: a backend tests itself now, where allocations are not recorded
        on_gpu, sizes = isinstance(latent, Tensor) and latent.is_cuda, self._known[call.module].site
        for settings in {each for each in self.sites.values() if on_gpu or each.backend != AUTO}:
            if left_to_host(settings, facts, layout.num_tokens) is not None:
                continue
            shape = (latent.shape[0], sizes.num_heads, layout.num_tokens, sizes.head_dim)
            needs = CallShape(settings.spec, layout, shape, call.dtype or latent.dtype, latent.device)
            backend, reasons = choose_backend(needs, settings.backend)
            if backend is None and settings.backend != AUTO and not settings.spec.is_dense:
                raise ValueError(
                    f"backend {settings.backend} cannot run here: {reasons[0].text}; choose backend {AUTO}"
                )

    def recording_paused(self, site: str) -> contextlib.AbstractContextManager[Any]:
        """Return the core's pause of recording for a site of the plan, whichever attention runs there.

        A recording that held the allocations of one step would not fit the next, where another attention may run.
        """
        settings = self.sites.get(site)
        if settings is None or settings.spec.is_dense:
            return contextlib.nullcontext()
        return self.memory.pause()

    def trusted(self, site: str) -> SiteSettings:
        """Return a site's settings, with backend torch where `auto` gave infinities or NaN there before."""
        settings = self.sites[site]
        if site not in self._distrusted or settings.backend != AUTO:
            return settings
        return replace(settings, backend="torch")

    def masked_in_another_half(self, site: str, half: Half) -> Reason | None:
        """Return that a mask kept this site dense for the other half of the guidance, which has to run alike."""
        if len(half) != 1 or not self._masked.get(site, set()) - {half}:
            return None
        return Reason(
            "mask", "an attention mask keeps the other half of the guidance dense, and both have to run alike"
        )

    def decline(self, site: str, dense_pairs: int, reason: Reason) -> None:
        """Count and log a fall-back to dense; raise it where tests ask for that."""
        if os.environ.get("LINEARIZE_STRICT") == "1" and reason.code not in _expected.get():
            raise UnexpectedDecline(f"{site}: {reason.text}")
        settings = self.sites[site]
        if settings.trained:
            reason = Reason(reason.code, f"trained weights on dense attention: {reason.text}")
        self.record.count_host(site, settings.spec.kind, dense_pairs, reason, chosen=False)
        once.warning(f"Linearize: dense attention where the plan says {settings.spec.kind}: {reason.text}")

    def note_mask(self, site: str, half: Half) -> None:
        """Remember that a mask kept this site dense for a half of the guidance."""
        self._masked.setdefault(site, set()).add(half)

    def note_output(self, site: str, output: Tensor) -> None:
        """Accumulate on the device whether outputs were finite; read once, when the run ends."""
        key = (site, output.device)
        finite = torch.isfinite(output.detach()).all()
        self._finite[key] = finite & self._finite[key] if key in self._finite else finite
