"""Stage 0: the matrices behind an attention, against least squares, and what they do to candidates."""

import pytest
import torch
from toy import HEADS, SIZE, ToyTeacher

from linearize.attention.kinds.output_map import map_outputs
from linearize.attention.layout import Segment, TokenLayout, grid_segment
from linearize.attention.specs import ClearSpec, LinearSpec
from linearize.training.engine.recipe import TransferRecipe
from linearize.training.transfer.closed_form import RIDGE, OutputFit
from linearize.training.transfer.transfer import Transfer

SITES = ("double.0", "single.0", "single.1")


def test_the_matrices_are_those_of_least_squares():
    """Ridge regression towards the identity, as rows that are appended to an ordinary problem."""
    random = torch.Generator().manual_seed(0)
    fit, calls = OutputFit(2, 5), []
    for _ in range(3):
        calls.append([torch.randn(2, 2, 11, 5, generator=random) for _ in range(2)])
        fit.add(*calls[-1])
    own, target = (torch.cat([call[i].transpose(0, 1).reshape(2, -1, 5) for call in calls], 1).double() for i in (0, 1))
    ridge = RIDGE * own.square().sum(1).mean(-1)
    for head, found in enumerate(fit.solve()):
        extra = ridge[head].sqrt() * torch.eye(5, dtype=torch.float64)
        rows, goals = torch.cat((own[head], extra)), torch.cat((target[head], extra))
        assert torch.allclose(found.double(), torch.linalg.lstsq(rows, goals).solution, atol=1e-5)


def test_a_head_that_gave_nothing_stays_as_it_is():
    fit = OutputFit(1, 4)
    fit.add(torch.zeros(1, 1, 7, 4), torch.zeros(1, 1, 7, 4))
    assert torch.equal(fit.solve()[0], torch.eye(4))


def test_global_tokens_are_left_alone():
    layout = TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 2, 5), Segment("reference", 2)))
    output, matrices = torch.randn(2, 4, 15, 6), torch.randn(4, 6, 6)
    before = output.clone()
    mapped = map_outputs(output, layout, matrices)
    assert torch.equal(mapped[:, :, :3], output[:, :, :3]) and torch.equal(mapped[:, :, 13:], output[:, :, 13:])
    for head in range(4):
        assert torch.allclose(mapped[1, head, 3:13], output[1, head, 3:13] @ matrices[head], atol=1e-6)
    assert torch.equal(output, before)


def test_windows_get_closer_to_the_teacher_without_an_update():
    recipe = TransferRecipe(updates=0, held_out=4, output_draws=12)
    plans = [dict.fromkeys(SITES, spec) for spec in (ClearSpec(radius=2), LinearSpec("favor"))]
    stage = Transfer(ToyTeacher(num_samples=20), plans, recipe, torch.device("cpu"))
    before, after = stage.fit_outputs()
    assert after == stage.measure()
    for site in SITES:
        assert after[site][0] < 0.95 * before[site][0], (site, before, after)
    matrices = stage.candidates(after)["single.0"][0].parameters["output.weight"]
    assert matrices.shape == (HEADS, SIZE, SIZE)


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_matrices_that_do_not_pay_are_not_kept(factor, monkeypatch):
    monkeypatch.setattr(OutputFit, "solve", lambda fit: factor * torch.eye(SIZE).expand(HEADS, SIZE, SIZE))
    recipe = TransferRecipe(updates=0, held_out=2, output_draws=1)
    stage = Transfer(ToyTeacher(), [dict.fromkeys(SITES, ClearSpec(radius=3))], recipe, torch.device("cpu"))
    before, after = stage.fit_outputs()
    assert after == before == stage.measure()
    assert all(not found[0].parameters for found in stage.candidates(after).values())


def test_a_call_that_is_not_finite_tells_nothing():
    fit, good = OutputFit(1, 4), torch.randn(1, 1, 9, 4)
    fit.add(good, 2 * good)
    before = fit.solve()
    fit.add(good, torch.full_like(good, float("inf")))
    assert torch.equal(fit.solve(), before)
