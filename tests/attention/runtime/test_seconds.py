"""Seconds a step: what counts as a step, what a dense one takes, and from how many tokens on a kind runs."""

import itertools

import pytest
import torch

from linearize.attention.planning.break_even import AUTO_TOKENS, least_tokens
from linearize.attention.runtime import seconds
from linearize.attention.runtime.decisions import ForwardFacts, SiteSettings, left_to_host
from linearize.attention.runtime.record import DenseSeconds, Ran, RunRecord
from linearize.attention.runtime.seconds import StepClock
from linearize.attention.specs import ClearSpec, FoveatedSpec

ASKED = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_in_sampling():
    """No call is timed where gradients are kept."""
    with torch.no_grad():
        yield


@pytest.fixture
def now(monkeypatch):
    """The time, as a list of one number that tests move."""
    time = [0.0]
    monkeypatch.setattr(seconds.time, "perf_counter", lambda: time[0])
    return time


def run(clock, now, forwards, options=ASKED):
    """Let forwards pass: (noise level, seconds, planned calls); return what the clock says then."""
    calls = 0
    for sigma, took, planned in forwards:
        clock.begin_forward({"sigmas": torch.tensor([sigma]), "sample_sigmas": options}, calls)
        now[0] += took
        calls += planned
    return clock.steps(calls)


def test_a_step_is_what_the_sampler_asked_for(now):
    """Two forwards of one noise level are the halves of the guidance; levels in between belong to the step before."""
    forwards = [(1.0, 9, 2), (0.8, 1, 2), (0.8, 2, 2), (0.65, 3, 2), (0.5, 2, 2), (0.2, 4, 2)]
    assert run(StepClock(), now, forwards) == ((1 + 2 + 3 + 2 + 4) / 3, None), "the first step warms up"


def test_forwards_a_step_are_counted_with_those_in_between(now):
    clock = StepClock()
    assert clock.forwards_a_step() == 1
    run(clock, now, [(sigma, 1, 2) for sigma in (1.0, 1.0, 0.9, 0.8, 0.8, 0.7)])
    assert clock.forwards_a_step() == 3


def test_a_single_step_is_all_there_is(now):
    assert run(StepClock(), now, [(1.0, 5, 2)]) == (5, None)


def test_a_sampler_that_keeps_to_none_of_its_levels_has_no_steps(now):
    """An adaptive one: all but the first of its noise levels are its own, and the whole run is no step."""
    assert run(StepClock(), now, [(1.0, 5, 2), (0.91, 5, 2), (0.77, 5, 2)]) == (None, None)


def test_dense_steps_are_told_from_planned_ones(now):
    forwards = [(1.0, 9, 0), (0.8, 4, 0), (0.5, 1, 3), (0.2, 2, 3)]
    assert run(StepClock(), now, forwards) == (1.5, DenseSeconds(4))
    assert run(StepClock(), now, [(s, 2, 0) for s in (1.0, 0.8)]) == (None, DenseSeconds(2))


def test_where_the_sampler_names_no_levels_each_is_a_step(now):
    assert run(StepClock(), now, [(0.9, 7, 1), (0.4, 3, 1), (0.1, 1, 1)], None) == (2, None)


def test_a_dense_step_is_worked_out_of_one_dense_call(now):
    """3 calls a step at 2 s, dense ones at 5 s: a dense step takes 9 s more."""
    clock = StepClock(knows_dense=False)
    dense_queries = []

    def call():
        now[0] += 2
        return "output"

    def dense(queries):
        now[0] += 5 * queries / 100
        dense_queries.append(queries)

    began, timed = [0, 3, 6], []
    for sigma, calls in zip((1.0, 0.8, 0.5), began, strict=True):
        clock.begin_forward({"sigmas": torch.tensor([sigma]), "sample_sigmas": ASKED}, calls)
        for _ in range(3):
            assert clock.run_call(CPU, call) == "output"
            timed.append(clock.has_call)
            if clock.has_call:
                clock.time_dense(CPU, dense, 100)
    assert timed == [False] * 3 + [True] + [False] * 5, "never in the first forward, and once a run"
    assert dense_queries == [100]
    seconds = clock.steps(9)
    assert seconds == (6, DenseSeconds(6 + 3 * (5 - 2), worked_out=True)), "timing dense is no part of a step"


def test_of_many_queries_some_are_timed(now):
    clock, asked = StepClock(knows_dense=False), []

    def dense(queries):
        asked.append(queries)
        now[0] += queries

    for calls in range(2):
        clock.begin_forward({}, calls)
        clock.run_call(CPU, lambda: None)
    clock.time_dense(CPU, dense, 100_000)
    assert asked == [seconds.TIMED_QUERIES] and clock._dense_call == pytest.approx(100_000)


def test_a_dense_call_that_fails_costs_nothing(now):
    clock = StepClock(knows_dense=False)
    for calls in range(2):
        clock.begin_forward({}, calls)
        clock.run_call(CPU, lambda: None)

    def fail(_):
        raise torch.OutOfMemoryError

    clock.time_dense(CPU, fail, 10)
    assert clock.steps(2)[1] is None
    clock.run_call(CPU, lambda: None)
    assert not clock.has_call, "it is not tried again"


LAYOUTLESS = ForwardFacts(layout=None, break_even={"clear": 50})


@pytest.mark.parametrize(("tokens", "stays_dense"), [(49, True), (50, False)])
def test_auto_keeps_small_calls_dense_and_says_so(tokens, stays_dense):
    reason = left_to_host(SiteSettings(ClearSpec(2), min_tokens=AUTO_TOKENS), LAYOUTLESS, tokens)
    if not stays_dense:
        assert reason is None
    else:
        assert reason.text == (
            "49 tokens: below 50 clear attention was never faster here (min_tokens 0 runs it all the same)"
        )
    assert left_to_host(SiteSettings(FoveatedSpec(), min_tokens=AUTO_TOKENS), LAYOUTLESS, tokens) is None
    assert left_to_host(SiteSettings(ClearSpec(2), min_tokens=AUTO_TOKENS, trained=True), LAYOUTLESS, tokens) is None


def test_the_table_says_where_rows_of_the_cpu_show_a_gain():
    """Kinds that lose at a stored size stay dense there."""
    assert [least_tokens("cpu", kind) for kind in ("clear", "foveated", "chunked")] == [4096, 4096, 16384]
    assert [least_tokens("cuda", kind) for kind in ("clear", "foveated")] == [4096, 8192]


def ran(*, pairs=17, seconds=None, dense=None, trained=(), kinds=("clear", "clear")):
    record = RunRecord(sampled=True, planned=("a.0", "a.1"), trained=frozenset(trained), finished=1, forwards=1)
    for number, kind in enumerate(kinds):
        if kind == "dense":
            record.count_host(f"a.{number}", "clear", 100, None, chosen=True)
        else:
            record.count_run(Ran(f"a.{number}", kind, "torch"), None, pairs, 100)
    record.seconds, record.dense_seconds = seconds, dense
    return record.outcome()


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        (
            {"seconds": 0.312, "dense": DenseSeconds(0.69)},
            "UNTRAINED · 17 % of attention · 2 of 2 sites · 0.31 s a step, dense 0.69",
        ),
        (
            {"seconds": 31.6, "dense": DenseSeconds(128.2, worked_out=True), "trained": ("a.0", "a.1")},
            "TRAINED · 17 % of attention · 2 of 2 sites · 32 s a step, dense about 128",
        ),
        (
            {"seconds": 2, "dense": DenseSeconds(1), "trained": ("a.1",)},
            "PARTLY TRAINED · 17 % of attention · 2 of 2 sites · 2.0 s a step, dense 1.0: costs more than dense at "
            "this size",
        ),
        ({"pairs": 139}, "UNTRAINED · 139 % of attention: computes more than dense · 2 of 2 sites"),
        ({"pairs": 100}, "UNTRAINED · 100 % of attention: covers the whole picture, saves nothing · 2 of 2 sites"),
        ({"pairs": 0.4, "kinds": ("clear", "dense")}, "UNTRAINED · 50 % of attention · 1 of 2 sites"),
        ({"kinds": ("dense",), "dense": DenseSeconds(4)}, "DENSE · 4.0 s a step"),
        ({"kinds": ("dense",), "dense": DenseSeconds(4, worked_out=True)}, "DENSE"),
    ],
)
def test_the_outcome_is_one_line(facts, outcome):
    assert ran(**facts) == outcome


def test_equal_seconds_are_not_called_more():
    for slower, dense in itertools.product((1.0, 1.02), (0.5, 3.0)):
        assert "more" not in ran(seconds=slower * dense, dense=DenseSeconds(dense))
