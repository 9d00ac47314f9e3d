"""Fine-tuning: a student's changes of weights join its maps, block by block on the teacher's inputs, then end to end.

The frozen base is loaded once and plays teacher and student in turns. A run that was stopped goes on as if it had not
been; what came out worse than it went in is not kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.layout import TokenLayout
from ...attention.site_call import SiteCall
from ...attention.students.candidates import Candidates
from ..engine.loop import Losses, Progress, Say, silent
from ..engine.losses import energies
from ..engine.protocols import BlockCall, Trainee
from ..engine.recipe import FinetuneRecipe
from ..engine.results import json_number, unmeasured
from ..engine.schedule import held_out_draws, split_samples
from ..engine.workers import ALONE, Workers
from ..transfer.site_trainer import grid_rows
from .deltas import attach
from .stages import BlockStage, PredictionStage, check_shown, sites_in_blocks
from .trainables import Trainables


@dataclass(frozen=True, slots=True)
class Errors:
    """What a student misses on held-out draws, as energies over the teacher's.

    Args:
        velocity: of the whole model's prediction.
        sites: of the attention outputs of converted sites, each on the teacher's inputs.
    """

    velocity: float
    sites: Mapping[str, float]


class Finetune:
    """Both stages in a row, as one stage for `loop.run_stage`.

    Args:
        trainee: the model and its samples; `close` takes the student off it.
        student: one candidate per converted site, see `candidates.decided`.
        recipe: how long, how fast, on what.
        device: of the parameters.
        workers: the other processes of this run.
        say: told what is measured.

    Raises:
        ValueError: the student does not fit the model or has nothing to learn, a package is missing, or blocks cannot
            be told.
    """

    def __init__(
        self,
        trainee: Trainee,
        student: Candidates,
        recipe: FinetuneRecipe,
        device: torch.device,
        workers: Workers = ALONE,
        say: Say = silent,
    ) -> None:
        self.trainables = Trainables(student, trainee.host, trainee.sites, trainee.module, recipe, device)
        self.trainee, self.recipe, self.workers = trainee, recipe, workers
        self.num_updates = recipe.block_updates + recipe.updates
        self.before: Errors | None = None
        self._say = say
        self._active: BlockStage | PredictionStage | None = None
        self.held_out = held_out_draws(
            recipe.seed, split_samples(trainee.num_samples)[1], recipe.held_out, trainee.has_negative
        )
        trainee.checkpointing = recipe.checkpointing
        trainee.install(self.trainables.specs, self.trainables.learned)
        self._detach = attach(trainee.module, self.trainables.deltas, trainee.switch)
        try:
            self._stage_at(0)  # what is missing shows now
        except ValueError:
            self.close()
            raise

    def update(self, number: int) -> Losses:
        """The first one measures where the student began."""
        if self.before is None:
            self.before = self.measure()
        stage = self._stage_at(number)
        return stage.update(number - self._first(stage.name))

    def measure(self) -> Errors:
        """Return the errors on held-out draws of the weights that would be saved."""
        if self._active is None:
            return self._measure()
        with self._active.learner.averaged():
            return self._measure()

    @torch.no_grad()
    def _measure(self) -> Errors:
        velocity, sites = [0.0, 0.0], dict[str, list[float]]()

        def compare(block: BlockCall) -> None:
            def see(call: SiteCall) -> None:
                if call.site in self.trainables.specs and isinstance(call.layout, TokenLayout):
                    rows, teacher = grid_rows(call), block.attention[call.site]
                    _add(sites.setdefault(call.site, [0.0, 0.0]), call.output[:, :, rows], teacher[:, :, rows])

            if any(site in self.trainables.specs for site in block.sites):
                block.run(see)

        for number, draw in enumerate(self.held_out, 1):
            self._say(f"measuring on held-out sample {number} of {len(self.held_out)}")
            teacher = self.trainee.each_block(draw, compare)
            _add(velocity, self.trainee.predict(draw), teacher)
        if sites_in_blocks(self.trainee) & self.trainables.specs.keys():
            check_shown(sites)
        return Errors(velocity[0] / velocity[1], {site: missed / whole for site, (missed, whole) in sites.items()})

    def result(self, progress: Progress) -> tuple[Candidates, str]:
        """Return the student, and how much it misses now, as text. It is the one that came in if that missed less.

        Args:
            progress: of the run.
        """
        student = self.trainables.student
        if self.before is None or not progress.done:
            return student, "no update was finished, so the student came out as it went in"
        before, after = self.before, self.measure()
        facts = {
            **self.recipe.to_json(), "updates_done": progress.done,
            "notes": [*progress.notes, *filter(None, [progress.problem])],
            "error_before": json_number(before.velocity), "error_after": json_number(after.velocity),
        }  # fmt: skip
        fell = after.velocity <= before.velocity or not math.isfinite(before.velocity)
        if not (fell and math.isfinite(after.velocity)):
            return student, (
                f"the student came out as it went in: its held-out error rose from {before.velocity:.3g} to"
                f" {after.velocity:.3g}; lower the learning rates or train longer"
            )
        assert self._active is not None
        with self._active.learner.averaged():
            found = self.trainables.candidates(after.sites, {**student.recipe, self.recipe.stage: facts})
        text = f"held-out error of the velocity {before.velocity:.3g} before, {after.velocity:.3g} after"
        strange = [site for site, error in after.sites.items() if not math.isfinite(error)]
        return found, "\n".join([text, *unmeasured(strange)])

    def state(self) -> dict[str, Tensor]:
        assert self._active is not None and self.before is not None
        state = {f"{self._active.name}.{name}": each for name, each in self._active.state().items()}
        errors = {"": self.before.velocity, **self.before.sites}
        return state | {f"before.{site}": torch.tensor(each, dtype=torch.float64) for site, each in errors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        name = next(stage.name for stage in (BlockStage, PredictionStage) if f"{stage.name}.steps" in tensors)
        errors = {
            key.removeprefix("before."): float(each) for key, each in tensors.items() if key.startswith("before.")
        }
        self.before = Errors(errors.pop(""), errors)
        prefix = f"{name}."
        kept = {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
        self._stage_at(self._first(name)).restore(kept)

    def relieve(self) -> str | None:
        return self._active.relieve() if self._active is not None else None

    def close(self) -> None:
        """Take the changes of weights off the model."""
        self._detach()

    def _first(self, name: str) -> int:
        return 0 if name == BlockStage.name else self.recipe.block_updates

    def _stage_at(self, number: int) -> BlockStage | PredictionStage:
        """Return the stage of an update; each begins with an optimiser and an average of its own."""
        wanted = BlockStage if number < self.recipe.block_updates else PredictionStage
        if not isinstance(self._active, wanted):
            self._active = wanted(self.trainee, self.trainables, self.recipe, self.workers)
        return self._active


def _add(total: list[float], output: Tensor, teacher: Tensor) -> None:
    missed, whole = energies(output, teacher)
    total[0] += missed
    total[1] += whole
