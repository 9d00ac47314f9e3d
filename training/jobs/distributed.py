"""Several processes that train one student: averages over them through accelerate, and failures that all learn of.

Every process holds the whole model and draws its own samples; what learns is small and is averaged. Nothing is sharded
here. One process is the same class without accelerate, so no loop asks how many there are.
"""

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.job_folder import JobFolder
from ..engine.loop import Losses, NotFinite, Stage
from .watch import Stop

TIMEOUT = timedelta(hours=2)  # processes load models and measure at their own pace
OTHERS = "another process of this run failed; its own message says why"


class OtherProcessFailed(RuntimeError):
    """Another process of this run failed; its own message says why."""


class ProcessGroup:
    """The processes of a run, as `workers.Workers` describes them.

    Args:
        accelerator: of accelerate, or None for one process.
    """

    def __init__(self, accelerator: Any | None = None) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.count: int = accelerator.num_processes if accelerator else 1
        self.is_updating = self.has_averaged = self.all_know = False

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over all processes, in place.

        Raises:
            torch.OutOfMemoryError: another process ran out of memory before this average of the update.
            OtherProcessFailed: another process failed otherwise.
        """
        groups: dict[torch.dtype, list[Tensor]] = {}
        for each in tensors if self._accelerator else ():
            groups.setdefault(each.dtype, []).append(each)
        # memory may run out here, before the others are told that all is well
        joined = [torch.cat([each.reshape(-1) for each in group]) for group in groups.values()]
        self._hear(memory=0, failed=0)
        for group, whole in zip(groups.values(), joined, strict=True):
            mean = self._reduce(whole) / self.count
            for each, part in zip(group, mean.split([each.numel() for each in group]), strict=True):
                each.copy_(part.view_as(each))
        self.has_averaged = True

    def wait(self) -> None:
        """Wait until all processes arrive here."""
        self.average(())

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean over all processes of each value; all name the same."""
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        self.average([tensor])
        return dict(zip(values, tensor.tolist(), strict=True))

    def close(self) -> None:
        """Leave the group of processes."""
        if self._accelerator is not None:
            self._accelerator.end_training()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an exception that ends this process, so that no other waits for it."""
        try:
            yield
        except Exception:
            self.report(memory=0)
            raise

    def report(self, *, memory: int) -> None:
        """Tell the others, where they next meet, that this process failed: it ran out of memory, or otherwise.

        Raises:
            OtherProcessFailed: this one ran out of memory, and another failed otherwise at the same place.
        """
        if self.all_know:
            return
        self.all_know = True
        _, failed = self._exchange(memory=memory, failed=1 - memory)
        if memory and failed:
            raise OtherProcessFailed(OTHERS)

    def _hear(self, **own: int) -> None:
        memory, failed = self._exchange(**own)
        if failed or (memory and (self.has_averaged or not self.is_updating)):
            self.all_know = True
            raise OtherProcessFailed(OTHERS)
        if memory:
            self.all_know = True
            raise torch.OutOfMemoryError("another process ran out of memory")

    def _exchange(self, *, memory: int, failed: int) -> tuple[int, int]:
        sums = self._reduce(torch.tensor([memory, failed], dtype=torch.float32)).tolist()
        return int(sums[0]), int(sums[1])

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, where the tensor lies."""
        if self._accelerator is None:
            return tensor
        return self._accelerator.reduce(tensor.to(self._accelerator.device), "sum").to(tensor.device)


class SynchronizedStage:
    """A stage whose updates all processes do together, as `loop.run_stage` runs it.

    Losses are means over the processes. Where one runs out of memory, all give up the same and repeat the update.

    Args:
        stage: that averages its gradients exactly once per update.
        workers: the same that the stage was given.
        stop: asked after each update; where any process says so, `stopping` is true on all.
    """

    def __init__(self, stage: Stage, workers: ProcessGroup, stop: Stop) -> None:
        self.stage, self.num_updates, self.stopping = stage, stage.num_updates, False
        self._workers, self._stop = workers, stop

    def update(self, number: int) -> Losses:
        workers = self._workers
        workers.is_updating, workers.has_averaged, workers.all_know = True, False, False
        try:
            losses = self.stage.update(number)
        except torch.OutOfMemoryError as error:
            averaged = workers.has_averaged
            workers.report(memory=1)
            if averaged and workers.count > 1:  # the others took the step already
                raise RuntimeError(f"memory ran out between processes: {error}") from error
            raise
        except NotFinite as error:
            if workers.count > 1:  # the others do not know of it, and cannot end at the same update
                raise ValueError(str(error)) from error
            raise
        finally:
            workers.is_updating = False
        means = workers.means({**losses, "": float(self._stop.is_set)})
        self.stopping = means.pop("") > 0
        return means

    def state(self) -> dict[str, Tensor]:
        return self.stage.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.stage.restore(tensors)

    def relieve(self) -> str | None:
        return self.stage.relieve()


class ReadOnlyJob(JobFolder):
    """A job's folder as the processes other than the first see it: read once, never written."""

    def __init__(self, root: Path, description: Mapping[str, Any]) -> None:
        super().__init__(root, description)
        self._state = super().state()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was there when the run began."""
        return self._state

    def save_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Leave it to the first process."""

    def finish(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Leave it to the first process."""

    def _set_aside(self, path: Path, reason: str) -> None:
        """Leave it to the first process."""


@contextlib.contextmanager
def shared_job(
    root: Path, description: Mapping[str, Any], workers: ProcessGroup, earlier: Sequence[Path] = ()
) -> Iterator[JobFolder]:
    """Open a job for all processes: the first one owns the folder, the others read the state that it resumes.

    Raises:
        JobProblem: as `JobFolder`.
        ValueError: the processes do not see the same folder.
    """
    with contextlib.ExitStack() as stack:
        if workers.rank == 0:
            job = stack.enter_context(JobFolder(root, description, earlier))
        workers.wait()
        if workers.rank:
            job = ReadOnlyJob(root, description)
        saved = job.state()
        done = saved[1]["done"] if saved else 0
        mean = workers.means({"done": done, "finished": float(job.result() is not None)})
        if mean["done"] != done or mean["finished"] not in (0.0, 1.0):
            raise ValueError(f"the processes see different states of the job; {root} must be the same folder for all")
        yield job
        workers.wait()


def join(*, on_cpu: bool = False) -> ProcessGroup:
    """Return the processes of this run: those that torchrun started, or this one alone.

    Args:
        on_cpu: leave accelerators alone.

    Raises:
        ValueError: there are several, and accelerate is not installed.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ProcessGroup()
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError:
        raise ValueError(
            "training in several processes needs the package accelerate; install it with: pip install accelerate"
        ) from None
    on_cpu = on_cpu or not torch.accelerator.is_available()
    accelerator = accelerate.Accelerator(
        cpu=on_cpu, kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=TIMEOUT)]
    )
    if accelerator.num_processes != count:
        raise ValueError(f"{count} processes were started, accelerate found {accelerator.num_processes} of them")
    return ProcessGroup(accelerator)
