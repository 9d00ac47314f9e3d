"""The run record: what every attention call of a sampling run did, for status texts, reports and tests.

Counting only; the decisions are made in `run_site.py` and `decisions.py`.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..layout import Reason, TokenLayout
from ..plans import describe_sites
from ..shown import printable
from ..words import counted, percent, seconds_as_text

log = logging.getLogger("linearize")

NO_LESS = 0.995  # of dense attention; a plan that computes this much saves nothing
SLOWER = 1.03  # a step within this factor of the dense one may be as fast: noise of a measurement


@dataclass(frozen=True, slots=True)
class DenseSeconds:
    """Seconds of a dense step; `worked_out` from one call where no dense step ran."""

    seconds: float
    worked_out: bool = False

    def times(self, factor: float) -> "DenseSeconds":
        """Return the seconds of `factor` as much."""
        return DenseSeconds(self.seconds * factor, self.worked_out)

    def __str__(self) -> str:
        return f"dense {'about ' if self.worked_out else ''}{seconds_as_text(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What ran at a site: its kind and backend ("host" where the host's own attention did)."""

    site: str
    kind: str
    backend: str


@dataclass(slots=True)
class RunRecord:
    """Counts of one sampling run.

    Args:
        ran: calls per site, kind and backend.
        declined: calls per site and reason that ran on the host's attention although the plan said otherwise.
        skipped: calls per site and reason that the user's own settings left to the host.
        passed_over: why a backend that `auto` would have preferred was not taken.
        below: what a later node put in place of this one's override; it runs the calls that stay dense.
        planned: the sites whose spec is not dense.
        trained: the sites whose weights were trained for their spec.
        merged: what another node's merge left of trained weights, in one sentence.
        sampled: whether a sampling run began with this record.
        forwards: of the model, as far as they were shown to this pack.
        finished: forwards that came to their end.
        non_finite: sites whose output held an infinity or a NaN.
        layouts: the distinct token layouts seen.
        planned_calls: that backends of the pack ran.
        break_even: by kind, the fewest tokens that an automatic `min_tokens` ran it at.
        seconds: of a step of the plan; dense_seconds: of a dense one, here or the last time, as text and number.
    """

    ran: Counter[Ran] = field(default_factory=Counter)
    declined: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    passed_over: set[Reason] = field(default_factory=set)
    below: str = ""
    planned: tuple[str, ...] = ()
    trained: frozenset[str] = frozenset()
    merged: str = ""
    sampled: bool = False
    forwards: int = 0
    finished: int = 0
    non_finite: tuple[str, ...] = ()
    layouts: set[TokenLayout] = field(default_factory=set)
    pairs: int = 0
    dense_pairs: int = 0
    planned_calls: int = 0
    break_even: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    dense_seconds: DenseSeconds | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count_run(self, ran: Ran, layout: TokenLayout, pairs: int, dense_pairs: int) -> None:
        """Count a call that a backend of the pack ran, with its FLOPs and those of dense attention, both in pairs."""
        with self._lock:
            self.ran[ran] += 1
            self.planned_calls += 1
            self.layouts.add(layout)
            self.pairs += pairs
            self.dense_pairs += dense_pairs

    def count_host(self, site: str, kind: str, dense_pairs: int, reason: Reason | None, *, chosen: bool) -> None:
        """Count a call that went to the host's attention.

        Args:
            reason: why, or None where the plan says dense.
            chosen: whether the user's own settings asked for it.
        """
        with self._lock:
            self.ran[Ran(site, "dense", "host")] += 1
            self.pairs += dense_pairs
            self.dense_pairs += dense_pairs
            if reason is not None:
                (self.skipped if chosen else self.declined)[site, reason] += 1

    def note_passed_over(self, reasons: Iterable[Reason]) -> None:
        """Note why `auto` passed over backends; each is logged once."""
        with self._lock:
            for reason in reasons:
                if reason not in self.passed_over:
                    self.passed_over.add(reason)
                    once.info(f"Linearize: {reason.text}")

    @property
    def sites_by_kind(self) -> dict[tuple[str, str], int]:
        """Number of sites per (kind, backend); a site that ran two ways counts in both."""
        return dict(Counter((ran.kind, ran.backend) for ran in self.ran))

    @property
    def never_called(self) -> tuple[str, ...]:
        """Sites of the plan that issued no attention call, in its order; a run that was stopped at once tells none."""
        called = {ran.site for ran in self.ran}
        return tuple(site for site in self.planned if site not in called and self.finished)

    @property
    def share_linearized(self) -> float:
        """Share of attention calls that did not run as dense attention, 0 to 1.

        A site that was never called counts as one that ran dense, as often as the busiest site was called.
        """
        calls: Counter[str] = Counter()
        for ran, count in self.ran.items():
            calls[ran.site] += count
        total = sum(calls.values()) + len(self.never_called) * max(calls.values(), default=0)
        return sum(n for ran, n in self.ran.items() if ran.kind != "dense") / total if total else 0.0

    @property
    def share_computed(self) -> float:
        """FLOPs over those of dense attention; feature maps can take more than they save."""
        return self.pairs / self.dense_pairs if self.dense_pairs else 1.0

    def summary(self) -> str:
        """Return the status text that nodes show, a line per fact."""
        if not self.sampled:
            return "this copy of the model was not sampled; connect the model that goes into the sampler"
        if not self.ran:
            return f"NOTHING RAN · no attention call reached this node: {self._why_nothing_ran()}"
        lines = [self.outcome()]
        for (kind, backend), sites in sorted(self.sites_by_kind.items()):
            lines.append(f"{kind} ({backend}): {counted(sites, 'site')}")
        if 0 < self.share_linearized < 1:
            lines.append(f"{percent(self.share_linearized)} of the calls, the others dense")
        if self.never_called:
            sites = f"{len(self.never_called)} of {counted(len(self.planned), 'site')} of the plan"
            which = describe_sites(self.never_called)
            lines.append(f"never called, {sites}: {which}; another node may run them its own way, or skip them")
        for label, counts in (("dense by setting", self.skipped), ("fell back to dense", self.declined)):
            reasons: Counter[str] = Counter()
            for (_, reason), calls in counts.items():
                reasons[reason.text] += calls
            lines += [f"{label}, {counted(calls, 'call')}: {text}" for text, calls in reasons.most_common()]
        # that there is no GPU is no news to who has none
        lines += sorted(reason.text for reason in self.passed_over if reason.code != "device")
        if self.below:
            lines.append(f"{self.below} comes after this node; it runs the calls that stay dense")
        if self.merged:
            lines.append(self.merged)
        if self.non_finite:
            lines.append(f"infinite or NaN output at {', '.join(self.non_finite)}")
        return "\n".join(lines)

    def outcome(self) -> str:
        """Return what came out in one line: trained or not, the share of attention, sites, seconds a step."""
        sites = {ran.site for ran in self.ran if ran.kind != "dense"}
        if not sites:
            reasons = Counter(
                reason.text for counts in (self.declined, self.skipped) for _, reason in counts.elements()
            )
            return " · ".join(["DENSE", *(text for text, _ in reasons.most_common(1)), *self._seconds_words()])
        trained = "TRAINED" if sites <= self.trained else "PARTLY TRAINED" if sites & self.trained else "UNTRAINED"
        share = f"{percent(self.share_computed)} of attention"
        if self.share_computed > 2 - NO_LESS:
            share += ": computes more than dense"
        elif self.share_computed >= NO_LESS:
            share += ": covers the whole picture, saves nothing"
        planned = max(len(self.planned), len(sites))
        return " · ".join([trained, share, f"{len(sites)} of {counted(planned, 'site')}", *self._seconds_words()])

    def _seconds_words(self) -> list[str]:
        dense = self.dense_seconds
        if self.seconds is None:
            return [f"{seconds_as_text(dense.seconds)} s a step"] if dense is not None and not dense.worked_out else []
        words = f"{seconds_as_text(self.seconds)} s a step"
        if dense is None:
            return [words]
        costs_more = ": costs more than dense at this size" if self.seconds > dense.seconds * SLOWER else ""
        return [f"{words}, {dense}{costs_more}"]

    def _why_nothing_ran(self) -> str:
        if not self.forwards:
            return (
                "the sampler shows no forward of this model to other code; it runs frame by frame, or with the"
                " settings of another model"
            )
        return "the model's attention has been replaced"


@dataclass(slots=True)
class LastRun:
    """The record of the last run of a model's clones, if there was one."""

    record: RunRecord | None = None


class Once:
    """Logs each distinct sentence once per process and logger."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def warning(self, text: str) -> None:
        """Log `text` unless it was logged before."""
        self._log(logging.WARNING, text)

    def info(self, text: str) -> None:
        """Log `text` for those who look for it, unless it was logged before."""
        self._log(logging.INFO, text)

    def _log(self, level: int, text: str) -> None:
        if text not in self._seen:
            self._seen.add(text)
            log.log(level, printable(text))


once = Once()
