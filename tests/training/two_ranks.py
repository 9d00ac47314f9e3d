"""What two processes must come to: one that averages the gradients of both ranks' draws itself."""

import pytest


class Kept(Exception):
    pass


class Second:
    """Rank 1 of two: keeps its gradients and goes no further."""

    rank, count = 1, 2

    def average(self, tensors):
        self.kept = [each.clone() for each in tensors]
        raise Kept


class First:
    """Rank 0 of two: averages its gradients with those that rank 1 kept."""

    rank, count = 0, 2

    def __init__(self, second):
        self.second = second

    def average(self, tensors):
        for mine, other in zip(list(tensors), self.second.kept, strict=True):
            mine.add_(other).div_(2)


def alone(make):
    """Return the state after all updates of a stage that one process trains on the draws of two."""
    second = Second()
    stage, helper = make(First(second)), make(second)
    for number in range(stage.num_updates):
        if number:
            helper.restore(stage.state())
        with pytest.raises(Kept):
            helper.update(number)
        stage.update(number)
    return stage.state()
