"""Several processes: two of them equal one that averages the gradients of the same draws, and fail together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_together
import torch
from two_ranks import alone

from linearize.training.engine.job_folder import JobFolder
from linearize.training.jobs.distributed import OtherProcessFailed, ProcessGroup, SynchronizedStage, join, shared_job
from linearize.training.jobs.watch import StopSignal

FOLDER = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder in which two processes ran every stage."""
    folder = tmp_path_factory.mktemp("together")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(FOLDER / "run_together.py"), str(folder)], check=True, env=environment)
    return folder


@pytest.mark.parametrize("name", ["transfer", "finetune"])
def test_two_processes_equal_one_that_averages(together, name):
    with JobFolder(together / name, {"name": name}) as job:
        found, values = job.result()
    expected = alone(getattr(run_together, name))
    assert found.keys() == expected.keys() and len(values["history"]["loss"]) > 4
    for key, tensor in expected.items():
        assert torch.allclose(found[key].double(), tensor.double(), rtol=1e-4, atol=1e-6), key


def test_where_one_process_runs_out_of_memory_all_give_up_the_same(together):
    with JobFolder(together / "memory", {"name": "memory"}) as job:
        _, values = job.result()
    assert values["notes"] == ["memory ran out, so 128 queries of each call are trained on"]
    assert len(values["history"]["loss"]) == run_together.TRANSFER.updates


def test_one_process_is_a_group_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    workers = join()
    assert (workers.rank, workers.count) == (0, 1)
    values = torch.tensor([1.0, 2.0])
    workers.average([values])
    assert values.tolist() == [1.0, 2.0] and workers.means({"a": 0.1}) == {"a": 0.1}
    with shared_job(tmp_path, {"a": 1}, workers) as job:
        assert isinstance(job, JobFolder) and job.state() is None


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match="needs the package accelerate; install it with: pip install accelerate"):
        join(on_cpu=True)


class Peer(ProcessGroup):
    """A group of two whose other process says what it is told to, meeting by meeting."""

    def __init__(self, *said):
        super().__init__()
        self.count, self.said, self.told = 2, list(said), []

    def _reduce(self, tensor):
        if tensor.numel() != 2 or tensor.dtype != torch.float32:
            return tensor * 2
        self.told.append(tensor.tolist())
        return tensor + torch.tensor(self.said.pop(0) if self.said else [0.0, 0.0])


class Tripling(Peer):
    """The other process has three times the numbers of this one."""

    def _reduce(self, tensor):
        return tensor * 4 if tensor.dtype == torch.float64 or tensor.numel() != 2 else super()._reduce(tensor)


def test_every_tensor_of_every_dtype_is_averaged():
    workers = Tripling()
    workers._accelerator = object()
    shapes = [((3, 5), torch.float32), ((7,), torch.float64), ((), torch.float32), ((1, 4), torch.bfloat16),
              ((2, 3), torch.float64), ((9,), torch.float32)]  # fmt: skip
    tensors = [torch.full(shape, number + 1.0, dtype=dtype) for number, (shape, dtype) in enumerate(shapes)]
    workers.average(tensors)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert torch.equal(tensor, torch.full(shape, 2 * (number + 1.0), dtype=dtype)), number


FINE, MEMORY, FAILED = [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]


def test_what_another_process_says_reaches_this_one():
    def update(*said):
        workers = Peer(*said)
        return workers, SynchronizedStage(run_together.transfer(workers), workers, StopSignal()).update

    workers, run = update(MEMORY)
    with pytest.raises(torch.OutOfMemoryError, match="another process ran out of memory"):
        run(0)
    assert workers.told == [FINE], "who hears of a failure does not report it again"
    _, run = update(FAILED)
    with pytest.raises(OtherProcessFailed):
        run(0)
    _, run = update(FINE, MEMORY)
    with pytest.raises(OtherProcessFailed):
        run(0)


class Exhausted:
    """A stage that runs out of memory before it averages."""

    num_updates = 1

    def update(self, number):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_who_runs_out_of_memory_hears_that_another_failed_at_the_same_place():
    """It would repeat the update with a process that left."""
    workers = Peer(FAILED)
    with pytest.raises(OtherProcessFailed):
        SynchronizedStage(Exhausted(), workers, StopSignal()).update(0)
    assert workers.told == [MEMORY]


def test_what_the_average_takes_is_taken_before_the_others_are_told_all_is_well(monkeypatch):
    workers = Peer()
    workers._accelerator = object()

    def scarce(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "cat", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        workers.average([torch.ones(2)])
    assert workers.told == []


def test_a_loss_that_is_not_finite_ends_all_processes_with_one_sentence(tmp_path):
    """Of the second process, at update 3: the first saves the two before, and nobody waits."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*command, str(FOLDER / "run_together.py"), str(tmp_path), "overflow"], env=environment,
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert run.returncode == 1 and run.stderr.count("single.0: the model's own attention is infinite or NaN at") == 1
    assert "NaN at update 3; load the model in bfloat16" in run.stderr
    with JobFolder(tmp_path / "overflow", {"name": "overflow"}) as job:
        assert job.result() is None and job.state()[1]["done"] == 2


def test_an_exception_is_reported_once():
    workers = Peer()
    with pytest.raises(ValueError, match="mine"), workers.reporting():
        raise ValueError("mine")
    assert workers.told == [FAILED]


def test_processes_that_see_different_folders_are_refused(tmp_path):
    class Lost(Peer):
        def means(self, values):
            return {name: value + 0.5 for name, value in values.items()}

    with pytest.raises(ValueError, match="must be the same folder for all"), shared_job(tmp_path, {"a": 1}, Lost()):
        pass
