"""What a watch measures of calls: errors against the float64 reference, seconds once a shape, what it leaves out."""

import math
from functools import partial

import pytest
import torch

from linearize.attention.calibration import times
from linearize.attention.calibration import watch as watching
from linearize.attention.calibration.measures import PAYS
from linearize.attention.calibration.times import Milliseconds
from linearize.attention.calibration.watch import SiteWatch
from linearize.attention.hosts.base import Site
from linearize.attention.kinds.reference import reference_attention
from linearize.attention.layout import Reason, Segment, TokenLayout, grid_segment
from linearize.attention.memory import LongLived
from linearize.attention.site_call import SiteCall
from linearize.attention.specs import ClearSpec, DenseSpec, FoveatedSpec, HybridSpec

LAYOUT = TokenLayout.of([Segment("text", 7), grid_segment("main", 1, 11, 13)])
SITES = [Site(f"single.{number}", 3, 16) for number in range(5)]
SPECS = (ClearSpec(3), FoveatedSpec(1, 0.2, 4))


def call_of(site, seed=0, layout=LAYOUT, mask=None, dtype=torch.float32):
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 3, 150, 16).to(dtype) for _ in range(3))
    again = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)
    return SiteCall(site, layout, query, key, value, again(), mask, None, again)


def watch_of(specs=SPECS, sites=SITES):
    return SiteWatch(sites, specs, LongLived(), lambda: None)


@pytest.fixture
def seconds(monkeypatch):
    """Make every computation take the seconds that its place in a list says: dense first, then the candidates."""
    asked, answers = [], [1.0, 0.5, 0.25]

    def call_seconds(device, compute, **_):
        compute()
        asked.append(compute)
        return answers[(len(asked) - 1) % len(answers)]

    monkeypatch.setattr(watching, "call_seconds", call_seconds)
    return asked, answers


def test_errors_are_energies_missed_of_the_float64_reference(seconds):
    watch, site = watch_of(), SITES[0].id
    calls = [call_of(site, seed) for seed in range(3)]
    for call in calls:
        watch.begin_step(1)
        watch.see(call)
    (found,) = watch.result()
    for measure in found.measures:
        missed = whole = 0.0
        for call in calls:
            output = reference_attention(call.query, call.key, call.value, LAYOUT, measure.spec)
            dense = reference_attention(call.query, call.key, call.value, LAYOUT, DenseSpec())
            missed += float((output - dense)[:, :, 7:].square().sum())  # all of the few queries on the grid
            whole += float(dense[:, :, 7:].square().sum())
        assert measure.error == pytest.approx(missed / whole, rel=1e-4)
    assert [each.seconds for each in found.measures] == [0.5, 0.25] and found.dense_seconds == 1.0 and found.calls == 1


def test_seconds_are_measured_once_a_shape(seconds):
    asked, _ = seconds
    watch = watch_of()
    watch.begin_step(0)
    for site in SITES:
        watch.see(call_of(site.id))
    turns = watching.TURNS * (1 + len(SPECS))
    assert len(asked) == turns
    watch.see(call_of(SITES[0].id, dtype=torch.bfloat16))
    assert len(asked) == 2 * turns, "another dtype takes other seconds"


def test_a_busy_moment_misleads_one_turn_only(monkeypatch):
    times = iter([1.0, 9.0, 0.25, 1.1, 0.5, 8.0])  # dense and two candidates, twice
    monkeypatch.setattr(watching, "call_seconds", lambda device, compute, **_: next(times))
    watch = watch_of()
    watch.begin_step(0)
    watch.see(call_of(SITES[0].id))
    (shape,) = watch.seen.shapes.values()
    assert shape.dense == 1.0 and list(shape.seconds.values()) == [0.5, 0.25]


def test_a_candidate_that_fails_in_its_second_turn_is_none(monkeypatch):
    asked = []

    def call_seconds(device, compute, **_):
        asked.append(compute)
        if len(asked) == 5:
            raise torch.OutOfMemoryError("too much")
        return 0.5

    monkeypatch.setattr(watching, "call_seconds", call_seconds)
    watch = watch_of()
    watch.begin_step(0)
    watch.see(call_of(SITES[0].id))
    (shape,) = watch.seen.shapes.values()
    assert list(shape.seconds) == [SPECS[1]]


def test_what_is_no_faster_than_dense_is_not_compared(seconds):
    seconds[1][1:] = [PAYS * 1.001, 0.25]
    watch = watch_of()
    watch.begin_step(1)
    watch.see(call_of(SITES[0].id))
    (found,) = watch.result()
    assert math.isnan(found.measures[0].error) and found.measures[1].error > 0
    assert [each.spec for each in found.usable] == [SPECS[1]]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_stride_meets_every_site_as_often(seconds, stride):
    watch, steps = watch_of(), 2 * stride
    for step in range(steps):
        watch.begin_step(stride)
        for site in SITES:
            watch.see(call_of(site.id, step))
    whole = [watch.seen.sums[site.id][SPECS[0]][1] for site in SITES]
    assert len(whole) == len(SITES) and max(whole) < 1.2 * min(whole)


def test_a_stride_that_changes_leaves_no_site_out(seconds):
    """A step's seconds, which the stride follows from, are known better after each step, and after a resume."""
    watch = watch_of()
    for stride in (0, 4, 5, 5, 5, 5):
        watch.begin_step(stride)
        for site in SITES:
            watch.see(call_of(site.id))
    assert all(site.reason == "" for site in watch.result()), watch.result()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layout": Reason("arguments", "nobody knows the tokens")}, "nobody knows"),
        ({"layout": TokenLayout.of([Segment("text", 150)])}, "no token lies on a grid"),
        ({"mask": torch.tril(torch.ones(150, 150, dtype=torch.bool))}, "mask hides"),
        ({"layout": TokenLayout.of([Segment("text", 8), grid_segment("main", 1, 11, 13)])}, "were expected"),
    ],
)
def test_calls_that_only_dense_attention_can_run_keep_their_site_dense(seconds, changed, words):
    watch = watch_of()
    watch.begin_step(1)
    watch.see(call_of(SITES[0].id, **changed))
    watch.see(call_of(SITES[1].id))
    closed, other = watch.result()
    assert words in closed.reason and closed.usable == () and other.usable
    assert closed.options().options == ()


def test_a_site_that_was_never_compared_stays_dense_and_says_why(seconds):
    watch = watch_of()
    watch.begin_step(0)
    watch.see(call_of(SITES[0].id))
    (found,) = watch.result()
    assert "first step only" in found.reason and found.usable == () and found.dense_seconds == 1.0


def test_a_mask_that_hides_nothing_is_no_mask(seconds):
    watch = watch_of()
    watch.begin_step(1)
    watch.see(call_of(SITES[0].id, mask=torch.zeros(150, 150)))
    assert watch.result()[0].usable


def test_a_candidate_that_fails_is_none(monkeypatch, seconds):
    watch = watch_of()
    run, failing = watch._run, []

    def breaks(call, spec):
        if spec == SPECS[0] and failing:
            raise torch.OutOfMemoryError("too much")
        return run(call, spec)

    watch._run = breaks
    watch.begin_step(1)
    watch.see(call_of(SITES[0].id))
    failing.append(True)
    watch.begin_step(1)
    watch.see(call_of(SITES[0].id, 1))
    (found,) = watch.result()
    assert [each.spec for each in found.usable] == [SPECS[1]], "it ran once, and ran out of memory later"


def test_the_user_can_stop_it_between_candidates(seconds):
    class Stopped(Exception):
        pass

    def stop():
        if watch.seen.calls[SITES[0].id]:
            raise Stopped

    watch = SiteWatch(SITES, SPECS, LongLived(), stop)
    watch.begin_step(1)
    with pytest.raises(Stopped):
        watch.see(call_of(SITES[0].id))


def test_made_up_tokens_are_timed_once_a_spec_and_layout():
    dense = []

    def run(query, key, value):
        dense.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    count = Milliseconds(run, torch.float32, torch.device("cpu"), lambda: None)
    for spec in (DenseSpec(), ClearSpec(3), HybridSpec(4, "hedgehog")):
        first = count.cost(spec, LAYOUT, 3, 16, has_matrices=False)
        assert 0 < first < 10**9 and first == count.cost(spec, LAYOUT, 3, 16, has_matrices=False)
    assert set(dense) == {(1, 3, 150, 16)}


def test_what_cannot_run_here_cannot_be_timed(monkeypatch):
    monkeypatch.setattr(times, "choose_backend", lambda shape: (None, (Reason("device", "no device runs it"),)))
    count = Milliseconds(lambda *each: each[0], torch.float32, torch.device("cpu"), lambda: None)
    with pytest.raises(ValueError, match="clear radius 3 cannot be timed: no device runs it"):
        count.cost(ClearSpec(3), LAYOUT, 3, 16, has_matrices=False)
