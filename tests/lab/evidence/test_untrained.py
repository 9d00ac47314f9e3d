"""The rivals of foveated attention against it and against loops, and the pages of what needs no training."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.kinds import kind as kinds
from linearize.attention.kinds.foveated import foveated_attention
from linearize.attention.planning.cost import attention_cost
from linearize.attention.spec_json import spec_from_json
from linearize.attention.specs import SPECS, FoveatedSpec
from linearize.lab.evidence import rivals, untrained, untrained_methods

ROWS, COLUMNS = 9, 13
LAYOUT = TokenLayout.of((Segment("text", 5), grid_segment("main", 1, ROWS, COLUMNS)))
WHOLE = TokenLayout.of((Segment("text", 5), grid_segment("main", 1, 8, 12)))  # tiles of 4 divide it


@pytest.fixture
def run(monkeypatch):
    """Return what a rival's spec computes of random tensors, with these; the kind is forgotten afterwards."""
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    for name in [*SPECS]:
        monkeypatch.setitem(SPECS, name, SPECS[name])
    rivals.add_rivals(SimpleNamespace(module=lambda name: importlib.import_module(f"linearize.{name}")))

    def compute(spec, layout=LAYOUT):
        torch.manual_seed(0)
        inputs = [torch.randn(2, 3, layout.num_tokens, 8) for _ in range(3)]
        rivals.TALLY.clear()
        found = spec_from_json({"kind": "rival", **spec})
        compute = kinds.kind_of(found).run
        return compute(*inputs, layout, found, kinds.Learned(), scale=None, memory=None), inputs

    yield compute
    SPECS.pop("rival")


@pytest.mark.parametrize("order", (0, 1))
@pytest.mark.parametrize("layout", (LAYOUT, WHOLE), ids=("ragged", "whole"))
def test_tiles_with_means_are_foveated_attention(run, layout, order, relative_error):
    rest = (rivals.MEANS, rivals.FIRST_ORDER)[order]
    output, inputs = run({"cut": rivals.TILES, "length": 4, "top": 0.2, "rest": rest}, layout)
    spec = FoveatedSpec(radius=1, top=0.2, tile=4, order=order)
    assert relative_error(output, foveated_attention(*inputs, layout, spec)) < 1e-5
    cost, own = attention_cost(spec, WHOLE, 1, 1), 8 * 12
    share = (cost.pairs - 5 * (WHOLE.num_tokens + own)) / own**2
    assert layout is LAYOUT or pytest.approx(rivals.TALLY) == [share]


@pytest.mark.parametrize("cut", (rivals.RUNS, rivals.TILES))
@pytest.mark.parametrize("rest", (rivals.DROPPED, rivals.MEANS, rivals.FIRST_ORDER))
def test_a_rule_that_drops_nothing_is_dense(run, cut, rest, relative_error):
    output, (query, key, value) = run({"cut": cut, "length": 3, "top": 1.0, "rest": rest})
    assert relative_error(output, torch.nn.functional.scaled_dot_product_attention(query, key, value)) < 1e-5
    assert rivals.TALLY == [1.0]


def test_tiles_that_are_chosen_by_scores_are_others(run):
    ours, _ = run({"cut": rivals.TILES, "length": 4, "top": 0.2}, WHOLE)
    shares = list(rivals.TALLY)
    other, _ = run({"cut": rivals.TILES, "length": 4, "top": 0.1, "by_scores": True}, WHOLE)  # rounded up
    assert pytest.approx(shares[0], abs=0.11) == rivals.TALLY[0] and not torch.allclose(ours, other)


def test_what_is_dropped_is_not_seen(run):
    output, (query, key, value) = run({"length": ROWS, "rest": rivals.DROPPED})
    for run_of_9 in range(COLUMNS):
        rows = slice(5 + ROWS * run_of_9, 5 + ROWS * (run_of_9 + 1))
        keys = [*range(5), *range(rows.start, rows.stop)]
        scores = query[:, :, rows] @ key[:, :, keys].transpose(-1, -2) * 8**-0.5
        torch.testing.assert_close(output[:, :, rows], scores.softmax(-1) @ value[:, :, keys])
    assert pytest.approx(rivals.TALLY) == [1 / COLUMNS]


def test_sol_attn_takes_what_is_far_above_the_mean():
    torch.manual_seed(1)
    query, key = torch.randn(1, 1, 7, 4, dtype=torch.float64), torch.randn(1, 1, 7, 4, dtype=torch.float64)
    found = rivals.chosen_runs(query, key, 0.0, 0.7, 1, 0.5)[0, 0]
    for row in range(7):
        centre = query[0, 0, row] * 0.5
        variance = sum(float(centre[axis] ** 2 * key[0, 0, :, axis].var(unbiased=False)) for axis in range(4))
        limit = float((key[0, 0] @ centre).mean()) + 0.7 * math.sqrt(variance + 1e-6)
        expected = [abs(row - place) <= 1 or float(key[0, 0, place] @ centre) >= limit for place in range(7)]
        assert found[row].tolist() == expected
    assert 0 < found.float().mean() < 1


def test_every_method_has_a_spec(run):
    for question in untrained.QUESTIONS.values():
        names = [method.name for method in question.methods]
        assert len(set(names)) == len(names)
        for method in question.methods:
            spec_from_json(method.spec)


def test_no_caption_that_something_was_tuned_on_is_held_out():
    tuned = {question.seed for name, question in untrained.QUESTIONS.items() if name.startswith("tuning")}
    shown = {question.seed for name, question in untrained.QUESTIONS.items() if not name.startswith("tuning")}
    assert tuned == {untrained.TUNING_SEED} and shown == {untrained.HELD_OUT_SEED}
    assert untrained_methods.PICTURES and untrained_methods.CLIPS
