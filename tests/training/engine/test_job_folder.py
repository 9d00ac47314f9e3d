"""A job's files: damaged ones are set aside with a sentence, and the run goes on from what came before."""

import logging
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_toy
import torch

from linearize.attention.students.tensor_file import FileProblem, open_tensor_file, write_tensor_file
from linearize.training.engine.job_folder import JobFolder, JobProblem, read_values
from linearize.training.engine.loop import Stopped, run_stage

DESCRIPTION = {"a": 1}


def names(job):
    return sorted(path.name for path in job.path.iterdir() if path.name not in ("lock", "job.json"))


def save(job, done):
    tensors = {"weight": torch.full((3, 5), float(done)), "history.loss": torch.ones(done, dtype=torch.float64)}
    job.save_state(tensors, {"done": done, "history": ["loss"], "notes": []})


@pytest.fixture
def job(tmp_path):
    with JobFolder(tmp_path / "jobs", DESCRIPTION) as opened:
        yield opened


def flipped(place):
    def flip(path, job):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(content)

    return flip


def of_another_job(path, job):
    with JobFolder(job.path.parent, {"a": 2}) as other:
        save(other, 9)
    path.write_bytes((other.path / "state.safetensors").read_bytes())


def of_the_result(path, job):
    job._write("result.safetensors", {"weight": torch.ones(2)}, {"text": "done"})
    (job.path / "result.safetensors").rename(path)


def of_another_format(path, job):
    write_tensor_file(path, {"weight": torch.ones(2)}, {"format": "linearize/1", "values": '{"done": 2}'})


DAMAGE = {
    **{f"flipped at {place:.0%}": flipped(place) for place in (0, 0.04, 0.1, 0.3, 0.5, 0.7, 0.85, 1)},
    "cut": lambda path, job: path.write_bytes(path.read_bytes()[:-7]),
    "cut in half": lambda path, job: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, job: path.write_bytes(b""),
    "zeros": lambda path, job: path.write_bytes(bytes(path.stat().st_size)),
    "another job's": of_another_job,
    "the result": of_the_result,
    "another format": of_another_format,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_state_is_set_aside_and_the_one_before_is_taken(how, job, caplog):
    save(job, 2)
    save(job, 3)
    DAMAGE[how](job.path / "state.safetensors", job)
    damaged = (job.path / "state.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING, "linearize"):
        tensors, values = job.state()
    assert values["done"] == 2 and tensors["weight"].unique().tolist() == [2.0]
    assert names(job) == ["damaged_1_state.safetensors", "state_before.safetensors"]
    assert (job.path / "damaged_1_state.safetensors").read_bytes() == damaged, "nothing is deleted"
    (note,) = job.notes
    assert str(job.path) in note and "set aside as damaged_1_state.safetensors" in note and note.isprintable()
    assert caplog.messages == [note]
    assert job.state()[1]["done"] == 2 and len(job.notes) == 1, "it is told once"
    save(job, 5)
    flipped(0.9)(job.path / "state.safetensors", job)
    flipped(0.9)(job.path / "state_before.safetensors", job)
    assert job.state() is None and "starts anew" in job.notes[-1]
    assert names(job) == [f"damaged_{name}.safetensors" for name in ("1_state", "1_state_before", "2_state")]


def test_what_is_kept(job):
    for done in (1, 2, 3):
        save(job, done)
    assert names(job) == ["state.safetensors", "state_before.safetensors"]
    done = [read_values(job.path / name)[1]["done"] for name in names(job)]
    assert done == [3, 2]
    (job.path / "state.safetensors").unlink()  # a kill between the two renamings
    assert job.state()[1]["done"] == 2 and not job.notes
    save(job, 4)
    job.finish({"weight": torch.ones(2)}, {"text": "done"})
    assert names(job) == ["result.safetensors", "state.safetensors"]
    assert job.result()[1] == {"text": "done"} and job.state()[1]["done"] == 4


def test_on_a_full_disk_two_states_are_there_while_one_is_written(job, monkeypatch):
    for done in (1, 2):
        save(job, done)
    usage = SimpleNamespace(free=(job.path / "state.safetensors").stat().st_size)
    monkeypatch.setattr("linearize.training.engine.job_folder.shutil.disk_usage", lambda _: usage)
    seen = []
    write = JobFolder._write
    monkeypatch.setattr(JobFolder, "_write", lambda *a, **more: (seen.append(names(job)), write(*a, **more)))
    save(job, 3)
    assert seen == [["state.safetensors"]] and names(job) == ["state.safetensors", "state_before.safetensors"]
    assert read_values(job.path / "state_before.safetensors")[1]["done"] == 2


def test_a_full_disk_without_an_earlier_state_costs_nothing(job, monkeypatch):
    save(job, 1)
    monkeypatch.setattr("linearize.training.engine.job_folder.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    save(job, 2)
    assert job.state()[1]["done"] == 2 and not job.notes


def test_a_job_is_one_runs_at_a_time(job):
    with pytest.raises(JobProblem, match="another run is working on this job"), JobFolder(job.path.parent, DESCRIPTION):
        pass
    job.__exit__()
    with JobFolder(job.path.parent, DESCRIPTION) as next_run:
        assert next_run.path == job.path


def test_drafts_of_an_earlier_version_are_cleared(job):
    job.__exit__()
    (job.path / ".job.json.a1b2").touch()
    with JobFolder(job.path.parent, DESCRIPTION):
        assert {path.name for path in job.path.iterdir()} == {"job.json", "lock"}


def test_files_of_earlier_versions_are_read(job):
    """They have no checksum."""
    for name in ("state", "result"):
        values = '{"done": 7, "history": [], "notes": []}'
        write_tensor_file(job.path / f"{name}.safetensors", {"weight": torch.ones(3)},
                          {"format": "linearize/job/1", "values": values})  # fmt: skip
    assert job.state()[1]["done"] == job.result()[1]["done"] == 7 and not job.notes
    save(job, 8)
    assert job.state()[1]["done"] == 8 and read_values(job.path / "state_before.safetensors")[1]["done"] == 7
    metadata = dict(open_tensor_file(job.path / "state.safetensors").metadata)
    for values in (None, "", "[]", "{", '{"a":' * 9000):
        kept = {name: text for name, text in metadata.items() if name == "format"}
        kept |= {} if values is None else {"values": values}
        write_tensor_file(job.path / "state.safetensors", {}, kept)
        with pytest.raises(FileProblem, match=r"^state.safetensors is no file of a training job$"):
            read_values(job.path / "state.safetensors")


def test_a_damaged_file_that_cannot_be_set_aside_is_a_sentence(job, monkeypatch):
    save(job, 2)
    (job.path / "state.safetensors").write_bytes(b"")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(JobProblem, match="delete that file, it cannot be set aside: Permission denied"):
        job.state()


@pytest.mark.parametrize("what", ["state", "result"])
def test_a_run_goes_on_from_what_is_whole_bit_by_bit(what, tmp_path):
    whole = run_toy.stage()
    for number in range(whole.num_updates):
        whole.update(number)

    def stop(done, total, losses):
        if what == "state" and done == 9:
            raise Stopped

    with JobFolder(tmp_path, DESCRIPTION) as job:
        stage = run_toy.stage()
        progress = run_stage(stage, job, stop)
        if what == "result":
            job.finish(stage.state(), {"done": progress.done})
        flipped(0.9)(job.path / f"{what}.safetensors", job)
    with JobFolder(tmp_path, DESCRIPTION) as job:
        assert job.result() is None
        stage, updates = run_toy.stage(), []
        run_stage(stage, job, lambda done, *_: updates.append(done))
        assert len(job.notes) == 1
    assert updates[:1] == ([9] if what == "state" else []) or 1 < updates[0] < 9
    found = stage.state()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state().items())
