"""The run record: what is counted, and the status text, line by line."""

import logging

import pytest

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.layout import Reason
from linearize.attention.runtime.record import Once, Ran, RunRecord

LAYOUT = TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 5, 6)))
MASK, FEW = Reason("mask", "a mask hides something"), Reason("min_tokens", "33 tokens, below min_tokens = 40")


def record():
    """Two calls of every site but double.3, which nobody called; double.2 ran dense, and once more by setting."""
    sites = tuple(f"double.{number}" for number in range(4))
    run = RunRecord(sampled=True, planned=sites, forwards=2, finished=2)
    for _ in range(2):
        run.count_run(Ran("double.0", "clear", "torch"), LAYOUT, 10, 100)
        run.count_run(Ran("double.1", "linear", "torch"), LAYOUT, 30, 100)
        run.count_host("double.2", "clear", 100, MASK, chosen=False)
        run.count_host("single.0", "dense", 100, None, chosen=True)
    run.count_host("double.2", "clear", 100, FEW, chosen=True)
    return run


def test_calls_are_counted_by_site_and_by_reason():
    run = record()
    assert run.ran == {
        Ran("double.0", "clear", "torch"): 2,
        Ran("double.1", "linear", "torch"): 2,
        Ran("double.2", "dense", "host"): 3,
        Ran("single.0", "dense", "host"): 2,
    }
    assert run.declined == {("double.2", MASK): 2} and run.skipped == {("double.2", FEW): 1}
    assert run.layouts == {LAYOUT} and run.never_called == ("double.3",)
    assert (run.pairs, run.dense_pairs) == (580, 900)
    assert run.share_linearized == 4 / (9 + 3), "a site that nobody called counts as often as the busiest one"
    assert run.share_computed == 580 / 900


def test_nothing_that_ran_is_nothing_linearized():
    assert (RunRecord().share_linearized, RunRecord().share_computed) == (0, 1)
    run = RunRecord()
    run.count_run(Ran("double.0", "clear", "torch"), LAYOUT, 1, 2)
    assert (run.share_linearized, run.share_computed) == (1, 0.5)


def test_the_status_is_a_line_per_fact():
    run = record()
    run.note_passed_over([Reason("triton", "Triton is missing"), Reason("device", "no GPU"), Reason("a", "A reason")])
    run.below, run.merged, run.non_finite = "another override", "weights were merged", ("double.0", "double.1")
    assert run.summary().split("\n") == [
        "UNTRAINED · 64 % of attention · 2 of 4 sites",
        "clear (torch): 1 site",
        "dense (host): 2 sites",
        "linear (torch): 1 site",
        "33 % of the calls, the others dense",
        "never called, 1 of 4 sites of the plan: double.3; another node may run them its own way, or skip them",
        "dense by setting, 1 call: 33 tokens, below min_tokens = 40",
        "fell back to dense, 2 calls: a mask hides something",
        "A reason",
        "Triton is missing",
        "another override comes after this node; it runs the calls that stay dense",
        "weights were merged",
        "infinite or NaN output at double.0, double.1",
    ]


def test_reasons_of_several_sites_are_added_up_and_the_most_frequent_comes_first():
    run = RunRecord(sampled=True)
    for site, reason in (("a.0", MASK), ("a.1", FEW), ("a.2", FEW)):
        run.count_host(site, "clear", 5, reason, chosen=False)
    assert run.summary().split("\n") == [
        f"DENSE · {FEW.text}",
        "dense (host): 3 sites",
        f"fell back to dense, 2 calls: {FEW.text}",
        f"fell back to dense, 1 call: {MASK.text}",
    ]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (RunRecord(forwards=2), "was not sampled; connect the model that goes into the sampler"),
        (RunRecord(sampled=True), "no attention call reached this node: the sampler shows no forward"),
        (RunRecord(sampled=True, forwards=1), "this node: the model's attention has been replaced"),
    ],
)
def test_where_nothing_ran_the_status_says_why(run, words):
    assert words in run.summary() and "\n" not in run.summary()


def test_a_run_that_finished_no_forward_misses_no_site():
    run = RunRecord(sampled=True, planned=("a.0", "a.1"), forwards=1)
    run.count_run(Ran("a.0", "clear", "torch"), LAYOUT, 1, 2)
    assert run.never_called == () and run.share_linearized == 1


def test_a_sentence_is_logged_once_at_its_level(caplog):
    once = Once()
    with caplog.at_level(logging.INFO, "linearize"):
        for _ in range(2):
            once.warning("two\nlines")
            once.info("for those who look")
    assert [(each.levelno, each.getMessage()) for each in caplog.records] == [
        (logging.WARNING, r"two\nlines"),
        (logging.INFO, "for those who look"),
    ]
