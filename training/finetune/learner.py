"""One phase's optimiser over a student's parameters: clipped steps, the average that is kept, its state."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...attention.students.tensor_values import below
from ..engine.optimizers import AVERAGING, OWN_RATE, OWN_SCHEDULE, make_optimizer, optimizer_state, restore_optimizer
from ..engine.recipe import FinetuneRecipe
from ..engine.workers import Workers
from .trainables import Trainables

BETAS = {"adamw": (0.9, 0.99), "adamw_8bit": (0.9, 0.99)}
AVERAGE = "average."


class Learner:
    """Steps of a student's parameters.

    Args:
        trainables: the parameters.
        recipe: optimiser, learning rates, average.
        workers: the processes that train together; gradients are averaged over them.
        factor: on the learning rates of the recipe.

    Raises:
        ValueError: the optimiser's package is not installed.
    """

    def __init__(self, trainables: Trainables, recipe: FinetuneRecipe, workers: Workers, factor: float = 1.0) -> None:
        self._trained, self._recipe, self._workers = trainables.trained(), recipe, workers
        groups = trainables.groups(recipe)
        self._rates = [1.0 if recipe.optimizer in OWN_RATE else factor * group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        options = {"betas": BETAS[recipe.optimizer]} if recipe.optimizer in BETAS else {}
        self.optimizer = make_optimizer(recipe.optimizer, groups, weight_decay=0.0, **options)
        if recipe.optimizer in AVERAGING:
            self.optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
        self._steps = 0
        self._average = {name: each.detach().clone() for name, each in self._trained.items()} if recipe.ema else {}

    def forget_gradients(self) -> None:
        """Drop gradients; an interrupted update leaves some."""
        self.optimizer.zero_grad()

    def step(self, rate: float) -> None:
        """Take one step, `rate` times the learning rates; none where the gradient is not finite.

        Args:
            rate: of the schedule; optimisers with a schedule of their own ignore it.
        """
        parameters = list(self._trained.values())
        self._workers.average(each.grad for each in parameters if each.grad is not None)
        norm = nn.utils.clip_grad_norm_(parameters, self._recipe.clip)
        if bool(torch.isfinite(norm)):
            for group, own in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = own if self._recipe.optimizer in OWN_SCHEDULE else own * rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        self._steps += 1
        # an average of few updates forgets where it began
        decay = min(self._recipe.ema, self._steps / (9 + self._steps))
        for name, average in self._average.items():
            average.lerp_(self._trained[name], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place, where the recipe has an average."""
        own = {name: each.detach().clone() for name, each in self._trained.items()} if self._average else {}
        if self._recipe.optimizer in AVERAGING:
            self.optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self._put(self._average)
            yield
        finally:
            self._put(own)
            if self._recipe.optimizer in AVERAGING:
                self.optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._trained[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return parameters, their average and what the optimiser remembers."""
        state = {f"parameters.{name}": each.detach() for name, each in self._trained.items()}
        state |= {AVERAGE + name: each for name, each in self._average.items()}
        state |= {f"optimizer.{name}": each for name, each in optimizer_state(self.optimizer).items()}
        return {**state, "steps": torch.tensor(self._steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self._put({name: state[f"parameters.{name}"] for name in self._trained})
        for name, each in self._average.items():
            each.copy_(state[AVERAGE + name])
        restore_optimizer(self.optimizer, below("optimizer.", state))
        self._steps = int(state["steps"])
