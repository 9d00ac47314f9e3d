"""Fine-tuning on one page: changes of a model's weights join the feature maps of its student.

    teacher   the model as it was loaded; its weights never change
    student   the same model in another role: converted sites run their specs, changes of weights are added by hooks
    stage 2   block by block: each block gets the teacher's inputs and learns what the teacher's block adds to them
    stage 3   end to end: the student learns the teacher's velocity, and its attention at some sites
    update    gradients of a few noised samples, averaged over processes and clipped; one step; an average follows
    result    the averaged weights, unless they miss more than the student that came in

`Finetune` is one stage to `engine/loop.py`; each of the two is a `Phase` of it. `measure.py` measures, `learner.py`
steps, `trainables.py` holds what learns, `roles.py` switches the roles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.site_call import SiteCall
from ...attention.students.candidates import Candidates
from ...attention.students.tensor_values import below
from ..engine.loop import Losses, NotFinite, Progress, Say, silent, unfinished
from ..engine.losses import residual_loss, squared_loss
from ..engine.protocols import BlockCall, Draw, Trainee
from ..engine.recipe import FinetuneRecipe
from ..engine.results import json_number, unmeasured
from ..engine.schedule import held_out_draws, rate_at, split_samples, training_draw
from ..engine.workers import ALONE, Workers
from .deltas import attach
from .learner import Learner
from .measure import NOT_CALLED, Errors, measure, sites_in_blocks
from .trainables import Trainables

BLOCK_FACTOR = 2.0  # on the learning rates: a block on the teacher's inputs takes larger steps than the whole model


@dataclass(frozen=True, slots=True)
class Phase:
    """Stage 2 or 3: a run of updates with one loss, an optimiser and an average of its own.

    Args:
        name: saved states begin with it.
        first: number of its first update.
        num_updates: how many it has.
        rate_factor: on the learning rates.
        floor: share of the learning rates that is left at its end.
        levels: how noise levels are drawn, see `FinetuneRecipe`.
    """

    name: str
    first: int
    num_updates: int
    rate_factor: float
    floor: float
    levels: str


class Finetune:
    """Stages 2 and 3 as one, as `loop.run_stage` runs it.

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
        self.trainee, self.recipe, self.workers, self._say = trainee, recipe, workers, say
        self.num_updates = recipe.block_updates + recipe.updates
        self._blocks = Phase("block", 0, recipe.block_updates, BLOCK_FACTOR, 0.01, "even")
        self._whole = Phase("prediction", recipe.block_updates, recipe.updates, 1.0, 1.0, recipe.noise_levels)
        self._phase: Phase | None = None
        self._every = recipe.attention_every
        self.before: Errors | None = None
        training, held_out = split_samples(trainee.num_samples)
        self._training, negative = training, trainee.has_negative
        self.held_out = held_out_draws(recipe.seed, held_out, recipe.held_out, negative)
        trainee.checkpointing = recipe.checkpointing
        trainee.install(self.trainables.specs, self.trainables.learned)
        self._detach = attach(trainee.module, self.trainables.deltas, trainee.switch)
        try:
            self._enter(0)  # what is missing shows now
        except ValueError:
            self.close()
            raise

    def update(self, number: int) -> Losses:
        """Take one step on the gradients of some draws. The first update measures where the student began."""
        if self.before is None:
            self.before = self.measure()
        phase, recipe = self._enter(number), self.recipe
        draws = self._draws(number, phase.levels)
        self._learner.forget_gradients()
        losses = self._learn_blocks(draws) if phase is self._blocks else self._learn_whole(draws)
        number -= phase.first
        for name, value in losses.items():
            if not math.isfinite(value):
                raise NotFinite(f"the loss {name} is {value} at update {number + 1}; lower the learning rates")
        self._learner.step(rate_at(number, phase.num_updates, recipe.warmup, phase.floor))
        return losses

    def _draws(self, number: int, levels: str) -> list[Draw]:
        """Return the draws of an update; each process has its own."""
        count, trainee, workers = self.recipe.accumulation, self.trainee, self.workers
        return [
            training_draw(
                self.recipe.seed, each * workers.count + workers.rank, self._training, trainee.has_negative, levels
            )
            for each in range(number * count, (number + 1) * count)
        ]

    def _learn_blocks(self, draws: Sequence[Draw]) -> Losses:
        """Add the gradients of every block with converted sites, on the teacher's inputs."""
        losses: list[float] = []

        def learn(block: BlockCall) -> None:
            if not any(site in self.trainables.specs for site in block.sites):
                return
            with torch.enable_grad():
                loss = residual_loss(block.run(None), block.outputs, block.inputs)
                if loss.requires_grad:
                    _backward(loss / len(draws))
            losses.append(float(loss.detach()))

        for draw in draws:
            self.trainee.each_block(draw, learn)
        if not losses:
            raise ValueError(NOT_CALLED)
        return {"loss": sum(losses) / len(losses)}

    def _learn_whole(self, draws: Sequence[Draw]) -> Losses:
        """Add the gradients of the whole student."""
        means: dict[str, float] = {}
        for draw in draws:
            loss, parts = self._loss(draw)
            _backward(loss / len(draws))
            for name, part in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0.0) + float(part.detach()) / len(draws)
        return means

    def _loss(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and its parts; `prediction` is always among them, because it tells the most."""
        recipe, teacher, student = self.recipe, dict[str, Tensor](), dict[str, Tensor]()
        sites = tuple(self.trainables.specs)[:: self._every] if recipe.attention else ()

        def keep_teacher(call: SiteCall) -> None:
            if call.site in sites:
                teacher[call.site] = call.output.clone()

        def keep_student(call: SiteCall) -> None:
            if call.site in sites:
                student[call.site] = call.output

        target = self.trainee.watch(draw, keep_teacher)
        velocity = self.trainee.predict(draw, keep_student if sites else None)
        parts = {"prediction": squared_loss(velocity, target)}
        if recipe.flow:
            parts["flow"] = squared_loss(velocity, self.trainee.flow_target(draw))
        if sites:
            if not student.keys() & teacher.keys():
                raise ValueError(NOT_CALLED)
            distances = [squared_loss(student[site], teacher[site]) for site in sites if site in student]
            parts["attention"] = torch.stack(distances).mean()
        weights = {"prediction": recipe.prediction, "flow": recipe.flow, "attention": recipe.attention}
        loss = torch.stack([weights[name] * part for name, part in parts.items() if weights[name]]).sum()
        return loss, parts

    def measure(self) -> Errors:
        """Return the errors on held-out draws of the weights that would be saved."""
        with self._learner.averaged():
            return measure(self.trainee, self.trainables.specs, self.held_out, self._say)

    def result(self, progress: Progress) -> tuple[Candidates, str]:
        """Return the student and a text on how much it misses: the original if that missed less.

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
            **unfinished(progress, self.num_updates),
        }  # fmt: skip
        fell = after.velocity <= before.velocity or not math.isfinite(before.velocity)
        if not (fell and math.isfinite(after.velocity)):
            return student, (
                f"the student came out as it went in: its held-out error rose from {before.velocity:.3g} to"
                f" {after.velocity:.3g}; lower the learning rates or train longer"
            )
        with self._learner.averaged():
            found = self.trainables.candidates(after.sites, {**student.recipe, self.recipe.method: facts})
        text = f"held-out error of the velocity {before.velocity:.3g} before, {after.velocity:.3g} after"
        strange = [site for site, error in after.sites.items() if not math.isfinite(error)]
        return found, "\n".join([text, *unmeasured(strange)])

    def state(self) -> dict[str, Tensor]:
        assert self._phase is not None and self.before is not None
        state = {f"{self._phase.name}.{name}": each for name, each in self._learner.state().items()}
        errors = {"": self.before.velocity, **self.before.sites}
        return state | {f"before.{site}": torch.tensor(each, dtype=torch.float64) for site, each in errors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        errors = {site: float(each) for site, each in below("before.", tensors).items()}
        self.before = Errors(errors.pop(""), errors)
        phase = next(phase for phase in (self._blocks, self._whole) if f"{phase.name}.steps" in tensors)
        self._enter(phase.first)
        self._learner.restore(below(f"{phase.name}.", tensors))

    def relieve(self) -> str | None:
        """Keep only the inputs of blocks, then compare fewer sites; one block at a time is the least there is."""
        if self._phase is self._blocks:
            return None
        if not self.trainee.checkpointing:
            self.trainee.checkpointing = True
            return "memory ran out, so blocks are computed again in the backward pass"
        if self.recipe.attention and self._every < len(self.trainables.specs):
            self._every *= 2
            return f"memory ran out, so the attention of one site in {self._every} is compared"
        return None

    def close(self) -> None:
        """Take the changes of weights off the model."""
        self._detach()

    def _enter(self, number: int) -> Phase:
        """Return the phase of an update; a new phase begins with an optimiser and an average of its own."""
        phase = self._blocks if number < self.recipe.block_updates else self._whole
        if phase is not self._phase:
            self._learner = Learner(self.trainables, self.recipe, self.workers, phase.rate_factor)
            self._phase = phase
            lost = [site for site in self.trainables.specs if site not in sites_in_blocks(self.trainee)]
            if phase is self._blocks and lost:
                raise ValueError(f"the transformer block of {lost[0]} cannot be told; set block_updates to 0")
        return phase


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"ComfyUI computes a part of this model without gradients, so it cannot be fine-tuned ({reason[:200]}); "
            "Distill Attention needs none"
        ) from error
