"""Calibrations in files and at other sizes: what comes back, damaged files, and costs that grow as the model says."""

import json
import math

import pytest
import torch

from linearize.attention.calibration import file as files
from linearize.attention.calibration.candidates import USUAL, read_candidates
from linearize.attention.calibration.choice import Choice, Target
from linearize.attention.calibration.describe import outcome
from linearize.attention.calibration.file import Calibration, file_name, read_calibrations, write_calibration
from linearize.attention.calibration.measures import Checked, Measure, SiteMeasures
from linearize.attention.calibration.other_size import at_latent, nearest
from linearize.attention.calibration.state import State, read_state, write_state
from linearize.attention.calibration.watch import Seen, ShapeKey, TimedShape
from linearize.attention.layout import Segment, TokenLayout, grid_segment, reference_segment
from linearize.attention.planning.cost import attention_cost
from linearize.attention.specs import ClearSpec, DenseSpec, FoveatedSpec

MACHINE = {"host": "flux", "device": "cpu", "torch": "2"}
LAYOUT = TokenLayout.of([Segment("text", 9), grid_segment("main", 1, 15, 22), reference_segment((1, 4, 5))])
FAST, NEAR = FoveatedSpec(1, 0.1, 4), ClearSpec(5)


def calibration(at=5.0, latent=(16, 30, 44)):
    measures = (Measure(FAST, 0.001, 0.02), Measure(NEAR, 0.002, math.nan))
    sites = (
        SiteMeasures("double.0", 1.0, 0.004, measures, LAYOUT, 3, 16),
        SiteMeasures("single.0", 2.0, 0.004, measures[:1], LAYOUT, 3, 16),
        SiteMeasures("single.1", 1.0, 0.0, reason="a mask hides tokens"),
    )
    choices = {Target("error", 0.01): ({"single.0": FAST}, Checked(0.008, 0.5)), Target("time", 0.3): ({}, None)}
    return Calibration(latent, 8, 0.7, 9.0, at, sites, {"double.0": 0.5, "single.0": 2.0}, choices)


def test_a_calibration_comes_back(tmp_path):
    path = tmp_path / "new" / file_name("flux", MACHINE)
    write_calibration(path, MACHINE, "16 x 30 x 44", calibration())
    write_calibration(path, MACHINE, "other", calibration(6.0, (16, 8, 8)))
    found = read_calibrations(path, MACHINE)
    assert list(found) == ["16 x 30 x 44", "other"]
    back, made = found["16 x 30 x 44"], calibration()
    assert repr(back.sites) == repr(made.sites)  # NaN is no equal of itself
    assert (back.weights, back.choices, back.latent) == (made.weights, made.choices, made.latent)
    choice = back.choice(Target("error", 0.01))
    assert choice.checked == Checked(0.008, 0.5) and choice.predicted == pytest.approx(2.0 * 0.02)
    assert back.choice(Target("error", 0.5)) is None


@pytest.mark.parametrize("machine", [{**MACHINE, "torch": "3"}, {**MACHINE, "device": "card"}, {}])
def test_another_machine_finds_nothing(tmp_path, machine):
    path = tmp_path / "plan.json"
    write_calibration(path, MACHINE, "size", calibration())
    assert read_calibrations(path, machine) == {}
    assert file_name("flux", machine) != file_name("flux", MACHINE)


def _damaged(change):
    def edit(path):
        data = json.loads(path.read_text())
        change(data["sizes"]["size"])
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text("{"), lambda path: path.write_bytes(b"\xff\x00"), lambda path: path.write_text("[]"),
    lambda path: path.write_text("[" * 100_000), lambda path: path.write_text('{"format": "linearize/calibration/2"}'),
    _damaged(lambda size: size["sites"]["double.0"].update(dense_seconds=-1)),
    _damaged(lambda size: size["sites"]["double.0"].update(dense_seconds=math.inf)),
    _damaged(lambda size: size["specs"][0].update(kind="no")), _damaged(lambda size: size.pop("weights")),
    _damaged(lambda size: size["choices"][0]["sites"].update({"single.0": {"kind": "linear"}})),
    _damaged(lambda size: size["layouts"][0][1].__setitem__(1, 7)),
])  # fmt: skip
def test_a_damaged_file_holds_nothing_and_is_replaced(tmp_path, damage):
    path = tmp_path / "plan.json"
    write_calibration(path, MACHINE, "size", calibration())
    damage(path)
    assert read_calibrations(path, MACHINE) == {}
    write_calibration(path, MACHINE, "size", calibration())
    assert list(read_calibrations(path, MACHINE)) == ["size"]


def test_the_newest_sizes_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_SIZES", 3)
    path = tmp_path / "plan.json"
    for at in (4.0, 1.0, 3.0, 2.0, 5.0):
        write_calibration(path, MACHINE, f"at {at:g}", calibration(at))
    assert sorted(read_calibrations(path, MACHINE)) == ["at 3", "at 4", "at 5"]


def test_the_same_latent_changes_nothing():
    made = calibration()
    assert repr(at_latent(made, made.latent).sites) == repr(made.sites)
    assert at_latent(made, made.latent).step_seconds == pytest.approx(made.step_seconds)


def test_another_latent_costs_what_the_cost_model_says():
    found = at_latent(calibration(), (16, 40, 60))
    site = found.sites[0]
    grown = TokenLayout.of([Segment("text", 9), grid_segment("main", 1, 20, 30), reference_segment((1, 4, 5))])
    assert site.layout == grown and site.measures[0].error == 0.02 and found.choices == {}
    for spec, seconds, new in ((DenseSpec(), 0.004, site.dense_seconds), (FAST, 0.001, site.measures[0].seconds)):
        ratio = attention_cost(spec, grown, 3, 16).flops / attention_cost(spec, LAYOUT, 3, 16).flops
        assert new == pytest.approx(seconds * ratio)
    rest = (0.7 - 0.012) * (40 * 60) / (30 * 44)
    assert found.step_seconds == pytest.approx(rest + 3 * site.dense_seconds)


@pytest.mark.parametrize(("latent", "which"), [
    ((16, 30, 44), 5.0), ((16, 28, 40), 5.0), ((16, 58, 60), 7.0), ((16, 8, 8), None), ((16, 5, 30, 44), None),
])  # fmt: skip
def test_the_nearest_size_is_taken_if_it_is_near(latent, which):
    known = {"a": calibration(5.0), "b": calibration(7.0, (16, 64, 64))}
    found = nearest(known, latent)
    assert (found and found.at) == which


def test_clips_grow_in_frames():
    layout = TokenLayout.of([grid_segment("main", 3, 4, 5)])
    site = SiteMeasures("blocks.0", 1.0, 0.1, (Measure(NEAR, 0.05, 0.1),), layout, 2, 8)
    made = Calibration((16, 3, 8, 10), 8, 1.0, 1.0, 1.0, (site,))
    assert at_latent(made, (16, 6, 8, 10)).sites[0].layout.grids == ((0, (6, 4, 5)),)


def test_a_state_comes_back_for_a_latent_of_its_shape(tmp_path):
    key = ShapeKey((1, 3, 359, 16), LAYOUT, "torch.float32")
    seen = Seen(3, {"single.0": 3}, {"single.1": "mask"}, {key: TimedShape(0.1, {FAST: 0.05})}, {"single.0": key},
                {"single.0": {FAST: (0.1, 2.0)}}, 4)  # fmt: skip
    latent = torch.randn(1, 16, 3, 5)
    points = {3: (latent + 1, torch.tensor(0.5), latent + 2)}
    path = tmp_path / "new" / "state.safetensors"
    write_state(path, State(4, 0.7, 9.5, latent, points, seen))
    found = read_state(path, torch.zeros(1, 16, 3, 5))
    assert found is not None and (found.done, found.step_seconds, found.spent, found.seen) == (4, 0.7, 9.5, seen)
    assert torch.equal(found.latent, latent) and torch.equal(found.points[3][2], latent + 2)
    assert read_state(path, torch.zeros(1, 16, 3, 6)) is None
    path.write_bytes(path.read_bytes()[:-7])
    assert read_state(path, latent) is None and read_state(tmp_path / "none", latent) is None


def test_candidates_are_read_as_people_write_them():
    assert len(read_candidates(USUAL)) == 8
    assert read_candidates("Clear 16，foveated .5, clear 16 ,") == (
        ClearSpec(16), *read_candidates("foveated 0.5"),
    )  # fmt: skip
    assert read_candidates("foveated 0.3", is_clip=True)[0].frames == 5


@pytest.mark.parametrize("text", [
    "", " , ", "clear", "clear 0", "clear 1.5", "foveated 1", "foveated 0.001", "foveated nan", "linear 4", "16",
    ", ".join(f"clear {n + 1}" for n in range(25)),
])  # fmt: skip
def test_candidates_that_cannot_be_read_are_a_sentence(text):
    with pytest.raises(ValueError, match="candidate"):
        read_candidates(text)


@pytest.mark.parametrize(("target", "is_within", "words"), [
    (Target("error", 0.01), True, "no plan stays within error 0.01"),
    (Target("time", 1.0), True, "dense attention is within that share of its time"),
    (Target("time", 0.3), False, "no plan gains a step"),
])  # fmt: skip
def test_dense_says_why(target, is_within, words):
    assert words in outcome(calibration(), Choice({}, {}, 0.0, None, is_within), target)


@pytest.mark.parametrize(("share", "is_within"), [(0.3, False), (0.7, True)])
def test_a_remembered_choice_knows_whether_it_reached_its_share(share, is_within):
    made = calibration()
    made.choices[Target("time", share)] = ({"single.0": FAST}, Checked(0.008, 0.5))
    assert made.choice(Target("time", share)).is_within == is_within, "6 of 12 ms are left"
