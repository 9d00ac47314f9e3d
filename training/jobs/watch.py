"""Who follows a run: told what is done, and able to end it early. The nodes and the worker have a `Watch` each.

Nothing is shown or written here.
"""

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ...attention.words import percent, seconds_as_text, time_left
from ..engine.loop import Losses, Progress, Stage
from ..engine.results import Finished

SIGNALS = ("SIGTERM", "SIGINT")


@dataclass(frozen=True, slots=True)
class Update:
    """One finished update.

    Args:
        done, total: how many are finished, this one included, and how many there are.
        losses: of this one, by name.
        seconds: that an update of this run takes on average.
    """

    done: int
    total: int
    losses: Losses
    seconds: float

    def __str__(self) -> str:
        losses = " · ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
        pace = f"{percent(self.done / self.total)} · {time_left(self.seconds * (self.total - self.done))}"
        return f"update {self.done} of {self.total} · {pace} · {losses} · {seconds_as_text(self.seconds)} s per update"

    def to_json(self) -> dict[str, Any]:
        """Return the update as a line of a progress file."""
        seconds = round(self.seconds, 4)
        return {"update": self.done, "of": self.total, "losses": dict(self.losses), "seconds": seconds}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Update":
        """Return the update that `to_json` wrote."""
        return cls(line["update"], line["of"], line["losses"], line["seconds"])


class Pace:
    """Measures how long the updates of a run take; it starts now."""

    def __init__(self) -> None:
        self._started, self._first = time.monotonic(), 0

    def seconds(self, done: int) -> float:
        """Return the seconds of an update, averaged over those of this run.

        Args:
            done: finished updates, those of earlier runs included.
        """
        self._first = self._first or done
        return (time.monotonic() - self._started) / (done - self._first + 1)


class Stop:
    """Whether a run ends after the update in progress; nobody asks this one for it."""

    is_set = False

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class StopSignal(Stop):
    """Notes SIGTERM and SIGINT while it is entered, instead of ending the process."""

    def __enter__(self) -> "StopSignal":
        kinds = [getattr(signal, name) for name in SIGNALS]
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.is_set = True


class Watch:
    """Follows a run in silence. Override what a user shall see, and what ends the updates early.

    `interrupts` are exceptions that end the updates and keep what was learned; `stop` is asked after each update.
    """

    interrupts: tuple[type[BaseException], ...] = ()

    def __init__(self, stop: Stop | None = None) -> None:
        self.stop = stop or Stop()

    def say(self, text: str) -> None:
        """Report what is done between updates."""

    def begin(self, stage: Stage) -> None:
        """Report that the updates of a stage begin."""

    def resumed(self, done: int) -> None:
        """Report the updates that earlier runs finished."""

    def update(self, update: Update) -> None:
        """Report an update."""

    def stopped(self, progress: Progress, total: int) -> None:
        """Report that updates were stopped. May raise: then the job ends here, without a result."""

    def end(self, result: Finished, file: Path) -> None:
        """Report the result, and the file that holds it if the job is finished."""
