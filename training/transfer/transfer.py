"""Stage 1: every candidate of every site learns from the teacher's own queries, keys and values.

The model runs as it was loaded and needs no gradient, so any quantised or offloaded one will do. One forward serves
all sites and all candidates; nothing a candidate computes goes back into the model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...attention.layout import Reason
from ...attention.planning.report import describe_spec
from ...attention.site_call import SiteCall, unusable
from ...attention.specs import SiteSpec
from ...attention.students.candidates import Candidate
from ...attention.words import memory_size
from ..engine.loop import Losses, NotFinite, Say, silent
from ..engine.protocols import Draw, Teacher
from ..engine.recipe import TransferRecipe
from ..engine.schedule import generator, held_out_draws, rate_at, split_samples, training_draw
from ..engine.workers import ALONE, Workers
from .closed_form import OutputFit
from .site_trainer import SiteTrainer

LEAST_QUERIES = 64
PASSES = "passes"  # in a saved state: how many forwards a round keeps
ErrorsBySite = dict[str, list[float]]  # by site, of its candidates


class Transfer:
    """Stage 1 as `loop.run_stage` runs it; stage 0 in the end, see `fit_outputs`.

    Args:
        teacher: the model and its samples.
        plans: specs by site; equal specs of a site are one candidate, dense ones none.
        recipe: how long, how fast, on what.
        workers: the other processes of this run; gradients are averaged over them.
        say: told what is measured or made.

    Raises:
        ValueError: no plan names a site, or a spec does not fit its site.
    """

    def __init__(
        self,
        teacher: Teacher,
        plans: Sequence[Mapping[str, SiteSpec]],
        recipe: TransferRecipe,
        device: torch.device,
        workers: Workers = ALONE,
        say: Say = silent,
    ) -> None:
        self.teacher, self.recipe, self.workers = teacher, recipe, workers
        self._say = say
        self.trainers: dict[str, list[SiteTrainer]] = {}
        for site in teacher.sites:
            specs = dict.fromkeys(plan[site.id] for plan in plans if site.id in plan)
            learned = [spec for spec in specs if not spec.is_dense]
            if learned:
                self.trainers[site.id] = [SiteTrainer(site, spec, recipe, device) for spec in learned]
        if not self.trainers:
            raise ValueError("the plans leave every site dense, so there is nothing to distil; choose another kind")
        self.num_updates = recipe.updates if any(each.optimizer is not None for each in self._all()) else 0
        self._queries = recipe.queries
        self._training, self._held_out = split_samples(teacher.num_samples)
        self._kept: list[dict[str, SiteCall]] = []
        self._round, self._passes, self._device = -1, 0, device

    def update(self, number: int) -> Losses:
        """Gradients of one forward, or of one kept in memory, then a step of every candidate.

        A candidate whose gradient alone is not finite takes no step.

        Raises:
            ValueError: a call cannot be learned from; no candidate took a step. NotFinite: a loss is not finite; the
                same.
        """
        losses: dict[str, list[float]] = {}
        failed: dict[str, Reason] = {}
        strange: list[str] = []

        def learn(call: SiteCall) -> None:
            reason = unusable(call)
            if reason is not None:
                failed[call.site] = reason
                return
            rows = self._rows(call, number)
            for trainer in self.trainers.get(call.site, ()):
                if trainer.optimizer is not None:
                    loss = trainer.backward(call, rows)
                    losses.setdefault(describe_spec(trainer.spec), []).append(loss)
                    if not math.isfinite(loss):
                        strange.append(_why_not_finite(call, trainer.spec, loss, number))

        self._forget_gradients()
        seen = self._show(number, learn)
        self._check_seen(seen, failed)
        if strange:
            raise NotFinite(strange[0])
        self.workers.average(p.grad for each in self._all() for p in each.parameters() if p.grad is not None)
        rate = rate_at(number, self.num_updates, self.recipe.warmup)
        for trainer in self._all():
            trainer.step(rate)
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        loss = sum(means.values()) / max(1, len(means))
        return {"loss": loss, **means}

    def measure(self) -> ErrorsBySite:
        """Return each candidate's error on held-out draws, by site."""
        sums = {site: [[0.0, 0.0] for _ in trainers] for site, trainers in self.trainers.items()}

        def compare(call: SiteCall) -> None:
            for trainer, total in zip(self.trainers[call.site], sums[call.site], strict=True):
                missed, whole = trainer.energies(call)
                total[0] += missed
                total[1] += whole

        draws = held_out_draws(self.recipe.seed, self._held_out, self.recipe.held_out, self.teacher.has_negative)
        self._pass(draws, compare, "measuring on held-out sample")
        return {site: [missed / whole for missed, whole in totals] for site, totals in sums.items()}

    def fit_outputs(self) -> tuple[ErrorsBySite, ErrorsBySite]:
        """Put the best matrices behind every candidate's attention, where they lower its error on held-out draws.

        Returns:
            The errors without and with them.
        """
        fits = {
            site: [OutputFit(each.site.num_heads, each.site.head_dim) for each in trainers]
            for site, trainers in self.trainers.items()
        }

        @torch.no_grad()
        def add(call: SiteCall) -> None:
            rows = call.grid_tokens()
            for trainer, fit in zip(self.trainers[call.site], fits[call.site], strict=True):
                fit.add(trainer.output(call).index_select(2, rows), call.output.index_select(2, rows))

        before = self.measure()
        numbers = range(self.recipe.output_draws)
        draws = [training_draw(self.recipe.seed + 1, n, self._training, self.teacher.has_negative) for n in numbers]
        self._pass(draws, add, "making matrices, pass")
        for site, trainers in self.trainers.items():
            for trainer, fit in zip(trainers, fits[site], strict=True):
                trainer.matrices = fit.solve()
        after = self.measure()
        for site, trainers in self.trainers.items():
            for number, trainer in enumerate(trainers):
                if not after[site][number] < before[site][number]:  # NaN is not lower
                    trainer.matrices, after[site][number] = None, before[site][number]
        return before, after

    def _pass(self, draws: Sequence[Draw], use: Callable[[SiteCall], None], what: str) -> None:
        """Run the teacher on draws and use the calls of sites that have candidates, saying what is done."""
        seen: set[str] = set()
        failed: dict[str, Reason] = {}

        def see(call: SiteCall) -> None:
            reason = unusable(call)
            if reason is not None:
                failed[call.site] = reason
            elif call.site in self.trainers:
                seen.add(call.site)
                use(call)

        for number, draw in enumerate(draws, 1):
            self._say(f"{what} {number} of {len(draws)}")
            self.teacher.watch(draw, see)
        self._check_seen(seen, failed)

    def candidates(self, errors: ErrorsBySite) -> dict[str, tuple[Candidate, ...]]:
        """Return what was learned, with the errors that `measure` returned."""
        return {
            site: tuple(
                Candidate(trainer.spec, error, trainer.result())
                for trainer, error in zip(trainers, errors[site], strict=True)
            )
            for site, trainers in self.trainers.items()
        }

    @property
    def notes(self) -> list[str]:
        """What was done otherwise than the recipe says."""
        replay, kept = self.recipe.replay, self._passes
        if not 0 < kept < replay:
            return []
        size = f"{memory_size(self.recipe.replay_bytes)} of host memory"
        return [f"of the {replay} passes to keep, {kept} at a time {'fits' if kept == 1 else 'fit'} into {size}"]

    def state(self) -> dict[str, Tensor]:
        return {
            f"{site}.{number}.{name}": tensor
            for site, trainers in self.trainers.items()
            for number, trainer in enumerate(trainers)
            for name, tensor in trainer.state().items()
        } | ({PASSES: torch.tensor(self._passes)} if self._passes else {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._passes = int(tensors.get(PASSES, 0))
        for site, trainers in self.trainers.items():
            for number, trainer in enumerate(trainers):
                prefix = f"{site}.{number}."
                own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                trainer.restore({name.removeprefix(prefix): tensor for name, tensor in own.items()})

    def relieve(self) -> str | None:
        """Train on half as many queries of a call."""
        now = self._queries or 8192
        if now <= LEAST_QUERIES:
            return None
        self._queries = now // 2
        return f"memory ran out, so {self._queries} queries of each call are trained on"

    def _show(self, number: int, learn: Callable[[SiteCall], None]) -> set[str]:
        """Show `learn` the calls of one forward; return the sites that were seen."""
        if self.recipe.replay == 1 and self.recipe.repeats == 1:
            seen = set()

            def see(call: SiteCall) -> None:
                if call.site in self.trainers:
                    seen.add(call.site)
                    learn(call)

            self.teacher.watch(self._draw(number), see)
            return seen
        calls = self._replayed(number)
        for call in calls.values():
            learn(moved(call, self._device))
        return set(calls)

    def _replayed(self, number: int) -> dict[str, SiteCall]:
        """Return the calls of a forward of this round; each is used `repeats` times, in an order of its own."""
        passes = self._passes or self.recipe.replay  # the first round tells how many memory holds
        round_number, place = divmod(number, passes * self.recipe.repeats)
        if self._round != round_number:
            self._kept = []  # before the next ones take its place
            self._kept, self._round = self._new_round(round_number * passes), round_number
        turn, place = divmod(place, len(self._kept))
        order = torch.randperm(len(self._kept), generator=generator(self.recipe.seed, "replay", round_number, turn))
        return self._kept[int(order[place])]

    def _new_round(self, first: int) -> list[dict[str, SiteCall]]:
        """Return the calls of as many forwards as memory is given for, at least one; all rounds have as many."""
        kept = [self._keep(first)]
        if not self._passes:
            held = sum(call_bytes(call) for call in kept[0].values())
            self._passes = max(1, min(self.recipe.replay, self.recipe.replay_bytes // max(1, held)))
        return kept + [self._keep(first + index) for index in range(1, self._passes)]

    def _keep(self, forward: int) -> dict[str, SiteCall]:
        calls: dict[str, SiteCall] = {}

        def keep(call: SiteCall) -> None:
            if call.site in self.trainers:
                calls[call.site] = moved(call, torch.device("cpu"), copy=True)

        self.teacher.watch(self._draw(forward), keep)
        return calls

    def _draw(self, forward: int) -> Draw:
        number = forward * self.workers.count + self.workers.rank
        return training_draw(self.recipe.seed, number, self._training, self.teacher.has_negative)

    def _rows(self, call: SiteCall, number: int) -> Tensor:
        """Return the queries of a call that are trained on, drawn anew for every update."""
        rows = call.grid_tokens()
        if not self._queries or len(rows) <= self._queries:
            return rows
        order = torch.randperm(len(rows), generator=generator(self.recipe.seed, "rows", number, call.site))
        return rows[order[: self._queries].sort().values.to(rows.device)]

    def _all(self) -> list[SiteTrainer]:
        return [trainer for trainers in self.trainers.values() for trainer in trainers]

    def _forget_gradients(self) -> None:
        for trainer in self._all():  # an update that was broken off leaves some
            trainer.zero_grad()

    def _check_seen(self, seen: set[str], failed: Mapping[str, Reason]) -> None:
        if failed:
            site, reason = next(iter(failed.items()))
            raise ValueError(f"{site} cannot be distilled here: {reason.text}")
        missing = [site for site in self.trainers if site not in seen]
        if missing:
            raise ValueError(
                f"the model ran without calling {missing[0]} through ComfyUI's attention; take out the node that"
                " replaces its attention"
            )


TENSORS = ("query", "key", "value", "output")


def moved(call: SiteCall, device: torch.device, *, copy: bool = False) -> SiteCall:
    """Return a call whose tensors lie on a device, without gradients; a copy outlives what the host does to its own."""
    tensors = {name: getattr(call, name).detach().to(device, copy=copy) for name in TENSORS}
    mask = None if call.mask is None else call.mask.to(device, copy=copy)
    return replace(call, **tensors, mask=mask)


def _why_not_finite(call: SiteCall, spec: SiteSpec, loss: float, number: int) -> str:
    if not bool(call.output.isfinite().all()):
        return (
            f"{call.site}: the model's own attention is infinite or NaN at update {number + 1}; load the model in"
            " bfloat16 or float32, or keep this site dense"
        )
    return (
        f"{call.site}, {describe_spec(spec)}: the loss is {loss} at update {number + 1}; lower the learning rate, or"
        " choose another kind for this site"
    )


def call_bytes(call: SiteCall) -> int:
    """Return the bytes that a call's tensors take."""
    return sum(getattr(call, name).nbytes for name in TENSORS)
