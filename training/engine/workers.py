"""The processes that train one student together: which one this is, and averages over all.

One process needs nothing; several are a `ProcessGroup` of `jobs/distributed.py`. The loops know nothing else of them.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class Workers(Protocol):
    """The processes of a run: `rank` of `count`; rank 0 writes files."""

    rank: int
    count: int

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes; all call with tensors of equal shapes, in equal order."""
        ...


class OneWorker:
    """A run of one process."""

    rank, count = 0, 1

    def average(self, tensors: Iterable[Tensor]) -> None:
        """The mean of one is itself."""


ALONE = OneWorker()
