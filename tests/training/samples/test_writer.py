"""Making samples: stopped at any moment it goes on without loss or double, and what cannot be done is one sentence."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sample_maker import PROMPTS, about, condition, make, noise

from linearize.attention.students import tensor_file
from linearize.attention.students.tensor_values import content_sha256
from linearize.training.samples import writer as samples_writer
from linearize.training.samples.conditioning import Conditioning
from linearize.training.samples.files import SamplesProblem, load_tensors
from linearize.training.samples.folder import TeacherSamples
from linearize.training.samples.writer import Request, SamplesWriter

MAKER = Path(__file__).parents[1] / "sample_maker.py"


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def contents(folder):
    """Return all files of a folder by what they hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): content_sha256(*load_tensors(path))
        if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in files
    }


@pytest.fixture
def killer(monkeypatch, tmp_path):
    """Return a function that arms a kill at the n-th write, and gives a counter of writes."""
    state = {"count": 0, "at": 0}
    rename, sync, save, append = os.replace, os.fsync, tensor_file._write, samples_writer.append_line

    def point(half=lambda: None):
        state["count"] += 1
        if state["count"] == state["at"]:
            half()
            raise Killed

    def leave_drafts():
        for folder in tmp_path.rglob("latents"):
            for name in (f".{'a' * 32}.tmp", ".tmpLeft42"):
                (folder / name).write_bytes(b"half")

    def write(file, tensors, metadata):
        point(leave_drafts)
        save(file, tensors, metadata)
        point()

    def append_line(path, line):
        point(lambda: _torn(path, line, state["at"]))
        append(path, line)
        point()

    def replace(source, target):
        point()
        rename(source, target)
        point()

    def fsync(handle):
        point()
        sync(handle)

    monkeypatch.setattr(tensor_file, "_write", write)
    monkeypatch.setattr(samples_writer, "append_line", append_line)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)

    def arm(at):
        state.update(count=0, at=at)
        return state

    return arm


def _torn(path, line, seed):
    with path.open("ab") as file:
        file.write(line[: random.Random(seed).randrange(len(line))])


def test_a_kill_at_any_write_loses_and_doubles_nothing(tmp_path, killer):
    state = killer(0)
    make(tmp_path / "whole")
    expected, writes = contents(tmp_path / "whole"), state["count"]
    assert writes > 60
    for at in random.Random(5).sample(range(1, writes + 1), 30):
        folder = tmp_path / str(at)
        killer(at)
        with pytest.raises(Killed):
            make(folder)
        assert all(torch.equal(found.latent(n), noise(7 + n, 1, 4, 6, 8)) for found, n in readable(folder))
        killer(random.Random(at).randrange(1, 12))  # a second one, soon after
        with pytest.raises(Killed):
            make(folder)
            raise Killed  # it was finished before
        killer(0)
        make(folder)
        assert contents(folder) == expected, at
        assert make(folder) == []


def readable(folder):
    """Yield (samples, number) of what a reader sees of an unfinished folder, which may be nothing."""
    try:
        samples = TeacherSamples.open(folder)
    except SamplesProblem:
        return
    for number in range(len(samples)):
        yield samples, number


@pytest.mark.parametrize("kill", [0, 2, 4])
def test_a_killed_process_loses_and_doubles_nothing(tmp_path, kill):
    settings = about(latent_shape=(1, 16, 200, 200))
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(MAKER), str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(kill + 1):
        assert process.stdout.readline()
    time.sleep(random.Random(kill).uniform(0, 0.01))
    process.kill()
    told = [kill, *map(int, process.stdout.read().split())]
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "latents").glob("0*")}
    made = make(folder, settings)
    assert made == list(range(6))[6 - len(made) :] and len(made) <= 6 - len(told) - kill
    for name in sorted(kept)[: kill + 1]:
        assert (folder / "latents" / name).stat().st_mtime_ns == kept[name], "what was finished is not made again"
    make(tmp_path / "whole", settings)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_torn_last_line_does_not_count_and_is_repaired(tmp_path):
    folder = tmp_path / "lake"
    make(folder)
    index = folder / "index.jsonl"
    whole = index.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    tails = [whole[last:stop] for stop in range(last, len(whole), 9)] + [bytes(40), bytes(40) + b"\n", b"\xff{\n"]
    for tail in tails:
        index.write_bytes(whole[:last] + tail)
        assert len(TeacherSamples.open(folder)) == 5, "a reader changes nothing and does not count it"
        assert index.read_bytes() == whole[:last] + tail
        assert make(folder) == [5]
        assert index.read_bytes() == whole


def test_prompts_may_be_added_at_the_end(tmp_path):
    make(tmp_path, prompts=PROMPTS[:2])
    assert make(tmp_path) == [4, 5]
    for prompts, words in [
        (PROMPTS[:1], "holds 6 samples and 2 are asked for; prompts may be added at the end, not taken away"),
        ([PROMPTS[1], *PROMPTS], "sample 0 in .* was made from the prompt 'a lake', which is 'a red house, .* now"),
    ]:
        with pytest.raises(SamplesProblem, match=words):
            make(tmp_path, prompts=prompts)
    assert make(tmp_path) == []


def test_another_conditioning_is_refused(tmp_path):
    make(tmp_path, prompts=[""])
    with SamplesWriter(tmp_path, about()) as writer:
        known = Request(0, "", condition("").file, condition("").file)
        assert writer.missing([known, Request(1, "")]) == []
        for other in (Request(0, "", condition("b").file), Request(0, "", None, condition("b").file)):
            with pytest.raises(SamplesProblem, match="sample 0 in .* was made from another conditioning"):
                writer.missing([other, Request(1, "")])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 5}, "steps is 4 there and 5 here; choose a new name, or set it back"),
        ({"latent_shape": (1, 4, 8, 6), "cfg": 1.0}, r"latent_shape is \(1, 4, 6, 8\) there and \(1, 4, 8, 6\) here"),
        ({"host": "wan"}, "host is flux there and wan here"),
        ({"fingerprint": about().fingerprint + 0.1}, r"model is another one \(norms 10% apart\)"),
    ],
)
def test_other_settings_are_named(tmp_path, changes, words):
    make(tmp_path)
    with pytest.raises(SamplesProblem, match=words):
        make(tmp_path, about(**changes))
    assert make(tmp_path, about(base_model="renamed.safetensors")) == []


def test_without_a_finished_sample_settings_may_still_change(tmp_path):
    with SamplesWriter(tmp_path / "new", about()):
        pass
    assert len(make(tmp_path / "new", about(steps=9))) == 6
    assert TeacherSamples.open(tmp_path / "new").about.steps == 9


def test_two_runs_on_one_folder_are_refused(tmp_path):
    with SamplesWriter(tmp_path, about()):
        with pytest.raises(SamplesProblem, match="another run is making samples in .*; wait for it, or choose a new"):
            make(tmp_path)
        code = "import sys, sample_maker; sample_maker.make(sample_maker.Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=MAKER.parent, capture_output=True, text=True
        )
        assert other.returncode and "another run is making samples" in other.stderr
    assert len(make(tmp_path)) == 6


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SamplesProblem, match=r"holds other files, such as thesis\.txt; choose a new name"):
        make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"thesis.txt", "lock"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SamplesProblem, match="cannot be written"):
        make(tmp_path / "file")


@pytest.mark.parametrize("where", ["latent", "conditioning", "line", "file"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch, where):
    make(tmp_path, prompts=PROMPTS[:1])
    before = contents(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_):
        raise full

    with monkeypatch.context() as patch:
        if where == "line":
            patch.setattr(samples_writer, "append_line", refuse)
        elif where == "file":
            patch.setattr(os, "replace", refuse)
        else:
            patch.setattr(tensor_file, "_write", refuse)
        with pytest.raises(SamplesProblem) as problem:
            make(tmp_path)
    said = str(problem.value)
    assert "No space left" in said and "its 2 finished samples are safe, and a next run goes on from there" in said
    assert "\n" not in said
    after = contents(tmp_path)
    assert before.items() <= after.items() and not [name for name in after if name.endswith(".tmp")]
    assert make(tmp_path) == [2, 3, 4, 5]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    resource = pytest.importorskip("resource")
    make(tmp_path, prompts=PROMPTS[:1])
    index = tmp_path / "index.jsonl"
    before = index.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError):
            samples_writer.append_line(index, before)
        size = index.stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert size == len(before) and index.read_bytes() == before


def test_what_no_sample_can_be_is_refused(tmp_path):
    with SamplesWriter(tmp_path, about(cfg=1.0)) as writer:
        positive = writer.put(condition("a"))
        latent = noise(1, 1, 4, 6, 8)
        with pytest.raises(SamplesProblem, match=r"sample 0 has shape \(1, 4, 6, 7\) where \(1, 4, 6, 8\)"):
            writer.add(0, "a", latent[..., :7], positive, None)
        latent[0, 1, 2, 3] = float("nan")
        with pytest.raises(
            SamplesProblem, match="sample 0 came out as NaN or infinity; sample this model with another"
        ):
            writer.add(0, "a", latent, positive, None)
        with pytest.raises(SamplesProblem, match="a conditioning holds NaN or infinity in 'option.pooled_output'"):
            writer.put(Conditioning(None, {"pooled_output": torch.tensor([float("inf")])}))
    assert not list((tmp_path / "latents").iterdir()) and not (tmp_path / "index.jsonl").exists()
