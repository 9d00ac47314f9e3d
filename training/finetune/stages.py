"""The two stages of fine-tuning: each block on the teacher's inputs, then the whole model on its own.

A stage changes gradients only until all draws of an update are known; then it takes one step. `finetune.py` runs them.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...attention.site_call import SiteCall
from ..engine.loop import Losses, NotFinite
from ..engine.losses import residual_loss, squared_loss
from ..engine.protocols import BlockCall, Draw, Trainee
from ..engine.recipe import FinetuneRecipe
from ..engine.schedule import rate_at, split_samples, training_draw
from ..engine.workers import ALONE, Workers
from .learner import Learner
from .trainables import Trainables

BLOCK_FACTOR = 2.0  # on the learning rates: a block on the teacher's inputs takes larger steps than the whole model


class _Learning:
    """What both stages have: draws, an optimiser with an average, and its state, see `loop.Stage`.

    Args:
        trainee: with the student installed.
        trainables: that learn.
        recipe: how.
        workers: the other processes of this run.
    """

    name = ""
    rate_factor = 1.0

    def __init__(
        self, trainee: Trainee, trainables: Trainables, recipe: FinetuneRecipe, workers: Workers = ALONE
    ) -> None:
        self._trainee, self._recipe, self._specs = trainee, recipe, trainables.specs
        self._draws = _Draws(trainee, recipe, workers, self.name)
        self.learner = Learner(trainables, recipe, workers, self.rate_factor)

    def state(self) -> dict[str, Tensor]:
        return self.learner.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.learner.restore(tensors)


class BlockStage(_Learning):
    """Stage 2: every block with converted sites learns on the teacher's inputs.

    Raises:
        ValueError: a converted site lies in no block that can be told.
    """

    name = "block"
    rate_factor = BLOCK_FACTOR

    def __init__(
        self, trainee: Trainee, trainables: Trainables, recipe: FinetuneRecipe, workers: Workers = ALONE
    ) -> None:
        super().__init__(trainee, trainables, recipe, workers)
        self.num_updates = recipe.block_updates
        lost = [site for site in self._specs if site not in sites_in_blocks(trainee)]
        if lost:
            raise ValueError(f"the transformer block of {lost[0]} cannot be told; set block_updates to 0")

    def update(self, number: int) -> Losses:
        found: list[float] = []

        def learn(block: BlockCall) -> None:
            if not any(site in self._specs for site in block.sites):
                return
            with torch.enable_grad():
                loss = residual_loss(block.run(None), block.outputs, block.inputs)
                if loss.requires_grad:
                    _backward(loss / self._recipe.accumulation)
            found.append(float(loss.detach()))

        self.learner.forget_gradients()
        for draw in self._draws.of(number):
            self._trainee.each_block(draw, learn)
        check_shown(found)
        losses = {"loss": sum(found) / len(found)}
        _check_finite(losses, number)
        self.learner.step(rate_at(number, self.num_updates, self._recipe.warmup))
        return losses

    def relieve(self) -> str | None:
        """One block at a time is the least there is."""
        return None


class PredictionStage(_Learning):
    """Stage 3: the whole student learns the teacher's velocity."""

    name = "prediction"

    def __init__(
        self, trainee: Trainee, trainables: Trainables, recipe: FinetuneRecipe, workers: Workers = ALONE
    ) -> None:
        super().__init__(trainee, trainables, recipe, workers)
        self.num_updates, self._every = recipe.updates, recipe.attention_every

    def update(self, number: int) -> Losses:
        self.learner.forget_gradients()
        sums: dict[str, float] = {}
        for draw in self._draws.of(number):
            total, parts = self._loss(draw)
            _backward(total / self._recipe.accumulation)
            for name, part in {"loss": total, **parts}.items():
                sums[name] = sums.get(name, 0.0) + float(part.detach()) / self._recipe.accumulation
        _check_finite(sums, number)
        self.learner.step(rate_at(number, self.num_updates, self._recipe.warmup, floor=1.0))
        return sums

    def _loss(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and its parts; `prediction` is always among them, because it tells the most."""
        recipe, teacher, student = self._recipe, dict[str, Tensor](), dict[str, Tensor]()
        sites = tuple(self._specs)[:: self._every] if recipe.attention else ()

        def keep_teacher(call: SiteCall) -> None:
            if call.site in sites:
                teacher[call.site] = call.output.clone()

        def keep_student(call: SiteCall) -> None:
            if call.site in sites:
                student[call.site] = call.output

        target = self._trainee.watch(draw, keep_teacher)
        velocity = self._trainee.predict(draw, keep_student if sites else None)
        parts = {"prediction": squared_loss(velocity, target)}
        if recipe.flow:
            parts["flow"] = squared_loss(velocity, self._trainee.flow_target(draw))
        if sites:
            check_shown([site for site in sites if site in student and site in teacher])
            each = [squared_loss(student[site], teacher[site]) for site in sites if site in student]
            parts["attention"] = torch.stack(each).mean()
        weights = {"prediction": recipe.prediction, "flow": recipe.flow, "attention": recipe.attention}
        total = torch.stack([weights[name] * part for name, part in parts.items() if weights[name]]).sum()
        return total, parts

    def relieve(self) -> str | None:
        """Keep only the inputs of blocks, then compare fewer sites."""
        if not self._trainee.checkpointing:
            self._trainee.checkpointing = True
            return "memory ran out, so blocks are computed again in the backward pass"
        if self._recipe.attention and self._every < len(self._specs):
            self._every *= 2
            return f"memory ran out, so the attention of one site in {self._every} is compared"
        return None


class _Draws:
    """The draws of a stage's updates, as a function of their numbers."""

    def __init__(self, trainee: Trainee, recipe: FinetuneRecipe, workers: Workers, stage: str) -> None:
        self._trainee, self._recipe, self._workers = trainee, recipe, workers
        self._training, _ = split_samples(trainee.num_samples)
        self._levels = recipe.noise_levels if stage == PredictionStage.name else "even"
        # end to end begins with other draws than block by block did
        self._skipped = recipe.block_updates if stage == PredictionStage.name else 0

    def of(self, number: int) -> list[Draw]:
        """Return the draws of an update."""
        seed, count, has_negative = self._recipe.seed, self._recipe.accumulation, self._trainee.has_negative
        first = (self._skipped + number) * count
        return [
            training_draw(
                seed, each * self._workers.count + self._workers.rank, self._training, has_negative, self._levels
            )
            for each in range(first, first + count)
        ]


def sites_in_blocks(trainee: Trainee) -> set[str]:
    """Return the sites that lie in some block of the model."""
    return {site for sites in trainee.blocks.values() for site in sites}


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


def _check_finite(losses: Mapping[str, Any], number: int) -> None:
    for name, value in losses.items():
        if not abs(value) < float("inf"):
            raise NotFinite(f"the loss {name} is {value} at update {number + 1}; lower the learning rates")


def check_shown(found: Collection[Any]) -> None:
    """Raise ValueError where no site was found to be called."""
    if not found:
        raise ValueError(
            "the model ran without calling the student's sites through ComfyUI's attention; take out the node that "
            "replaces its attention"
        )
