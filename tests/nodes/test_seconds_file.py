"""Seconds from run to run: what the file holds, what it says of break-even, and files that nobody can read."""

import json
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def seconds_file(comfy, tmp_path):
    """A file in a folder that is not there yet."""
    return comfy.module("patching.seconds_file").SecondsFile(tmp_path / "new" / "seconds.json")


@pytest.fixture
def size(comfy):
    """A function that makes the size of a step."""
    step_size = comfy.module("attention.runtime.seconds").StepSize
    return lambda tokens, model="flux on a card", batch=1: step_size(model, tokens, batch)


@pytest.fixture
def dense(comfy):
    """A function that makes dense seconds."""
    return comfy.module("attention.runtime.record").DenseSeconds


def test_the_last_dense_seconds_of_a_model_and_size_come_back(seconds_file, size, dense):
    assert seconds_file.dense(size(100)) is None
    seconds_file.note(size(100), "clear radius 8", 0.5, dense(2.0, worked_out=True))
    seconds_file.note(size(100), "clear radius 8", 0.4, None)
    assert seconds_file.dense(size(100)) == dense(2.0, worked_out=True), "a run without dense steps keeps it"
    seconds_file.note(size(100), "", None, dense(1.5))
    assert seconds_file.dense(size(100)) == dense(1.5)
    for other in (size(101), size(100, batch=2), size(100, "wan on a card")):
        assert seconds_file.dense(other) is None


@pytest.mark.parametrize(
    ("runs", "least"),
    [
        ([], 300),
        ([(100, 3.0, 2.0)], 300),  # slower below the table's size says nothing against the table
        ([(100, 2.0, 3.0)], 100),
        ([(100, 3.0, 2.0), (400, 9.0, 8.0)], 401),
        ([(100, 3.0, 2.0), (400, 2.0, 8.0), (900, 2.0, 9.0)], 400),
        ([(500, 1.99, 2.0)], 501),  # as fast is not faster
    ],
)
def test_a_kind_pays_from_the_smallest_size_at_which_it_was_ever_faster(seconds_file, size, dense, runs, least):
    for tokens, planned, seconds in runs:
        seconds_file.note(size(tokens), "clear radius 8", planned, dense(seconds))
    assert seconds_file.break_even("flux on a card", "clear radius 8", 300) == least
    assert seconds_file.break_even("flux on a card", "clear radius 16", 300) == 300
    assert seconds_file.break_even("wan on a card", "clear radius 8", 300) == 300


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "other", "models": {}}', '{"format": "linearize/seconds/1"}',
     '{"format": "linearize/seconds/1", "models": {"flux on a card": {"100 x 1": {"dense": {"seconds": "x"}}}}}',
     '{"format": "linearize/seconds/1", "models": {"flux on a card": {"100 x 1": {"dense": {"seconds": 1, "at": '
     'Infinity, "worked_out": false}}}}}', "[" * 100_000],
)  # fmt: skip
def test_a_file_that_nobody_can_read_holds_nothing_and_is_replaced(seconds_file, size, dense, text):
    seconds_file.path.parent.mkdir()
    seconds_file.path.write_text(text)
    assert seconds_file.dense(size(100)) is None and seconds_file.break_even("flux on a card", "clear", 7) == 7
    seconds_file.note(size(100), "clear", 1.0, dense(2.0))
    assert seconds_file.dense(size(100)) == dense(2.0)


def test_the_file_stays_small(seconds_file, size, dense, comfy, monkeypatch):
    monkeypatch.setattr(comfy.module("patching.seconds_file"), "MOST_SIZES", 3)
    for tokens in range(1, 7):
        seconds_file.note(size(tokens), "clear", 1.0, dense(2.0))
    assert len(json.loads(seconds_file.path.read_text())["models"]["flux on a card"]) == 3


def test_a_run_is_remembered_and_the_next_one_knows_its_dense_seconds(comfy, studio, seconds_file, dense, monkeypatch):
    """In the real sampler: the first run times one dense call, the second does not, and both say what dense takes."""
    monkeypatch.setattr(comfy.module("patching.install"), "SecondsFile", lambda: seconds_file)
    patched = studio.clear(studio.model, radius=2)
    runtime = studio.patching.runtime_of(patched)
    for known in (False, True):
        studio.sample(patched, steps=4)
        assert runtime.record.dense_seconds.worked_out
        assert " s a step, dense about " in runtime.record.outcome()
        assert (runtime.clock._dense_call == 0) == known
    again = studio.clear(studio.model, radius=2, end_percent=0.5)
    studio.sample(again, steps=4)
    found = studio.record(again).dense_seconds
    assert found is not None and not found.worked_out, "dense steps of the run itself are measured"
    assert seconds_file.dense(runtime._size) == dense(round(found.seconds, 5))


def test_a_sampler_of_more_forwards_a_step_is_not_held_against_one_of_fewer(comfy, seconds_file, size, dense):
    """Euler's dense step takes 2 s; Heun's takes two forwards, so dense about 4 s."""
    runtime = comfy.module("attention.runtime.runtime").Runtime(None, {}, None, ledger=seconds_file)
    runtime._size = size(100)
    for forwards, expected in ((1, 2.0), (2, 4.0)):
        runtime.record.finished = runtime.record.forwards = 3
        known = dense(2.0) if forwards == 1 else None
        runtime.clock = SimpleNamespace(
            steps=lambda calls, known=known: (None if known else 3.0, known), forwards_a_step=lambda n=forwards: n
        )
        runtime._read_clock()
        assert runtime.record.dense_seconds == dense(expected)


def test_a_run_of_few_sites_says_nothing_of_a_run_of_many(comfy, seconds_file, size, dense):
    """One site of many gains too little to see, however fast its attention is."""
    module, specs = comfy.module("attention.runtime.runtime"), comfy.module("attention.specs")
    settings = module.SiteSettings(specs.ClearSpec(2))
    one, two = (module.Runtime(None, dict.fromkeys(ids, settings), None, ledger=seconds_file) for ids in ("a", "ab"))
    one._size, one.record.finished, one.record.forwards = size(100), 1, 1
    one.clock = SimpleNamespace(steps=lambda calls: (1.99, dense(2.0)), forwards_a_step=lambda: 1)
    one._read_clock()
    least = [seconds_file.break_even("flux on a card", *each.described().values(), 64) for each in (one, two)]
    assert least == [101, 64]


def test_a_run_that_ended_inside_a_forward_has_no_seconds(comfy, seconds_file, size, dense):
    runtime = comfy.module("attention.runtime.runtime").Runtime(None, {}, None, ledger=seconds_file)
    runtime._size, runtime.record.forwards, runtime.record.finished = size(100), 3, 2
    runtime.clock = SimpleNamespace(steps=lambda calls: (None, dense(2.0)), forwards_a_step=lambda: 1)
    runtime._read_clock()
    assert runtime.record.seconds is None and seconds_file.dense(size(100)) is None


def test_auto_runs_dense_at_a_tiny_size_and_says_why(studio):
    patched = studio.clear(studio.model, radius=2, min_tokens=-1)
    assert torch.equal(studio.sample(patched), studio.sample(studio.model))
    assert studio.record(patched).outcome().startswith("DENSE · 108 tokens: below 4,096 clear attention was never")
