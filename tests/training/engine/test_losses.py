"""Losses by their definitions, on numbers that a person can follow."""

import math

import pytest
import torch

from linearize.training.engine.losses import energies, residual_loss, score_loss, squared_loss, value_loss

TEACHER = torch.tensor([[3.0, -4.0], [0.0, 5.0]])  # mean size 3, energy 12.5
OUTPUT = TEACHER + torch.tensor([[1.0, 0.0], [-2.0, 0.0]])  # misses 3 in all, 5 squared


def test_distances_are_taken_over_the_teachers_own_size():
    assert float(value_loss(OUTPUT, TEACHER)) == pytest.approx(3 / 12)
    assert float(squared_loss(OUTPUT, TEACHER)) == pytest.approx(5 / 50)
    for loss in (value_loss, squared_loss):
        assert float(loss(7 * OUTPUT, 7 * TEACHER)) == pytest.approx(float(loss(OUTPUT, TEACHER)))
        assert loss(OUTPUT.half(), TEACHER.half()).dtype == torch.float32


def test_a_teacher_of_zeros_divides_by_no_zero():
    zeros = torch.zeros(2, 2)
    for loss in (value_loss, squared_loss):
        assert float(loss(zeros, zeros)) == 0 and float(loss(1e-9 * OUTPUT, zeros)) > 0
        assert math.isfinite(float(loss(OUTPUT, zeros)))
    assert float(residual_loss([zeros], [zeros], [zeros])) == 0


def test_a_blocks_error_is_over_what_the_block_adds():
    given = TEACHER - torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # the block adds 4 squared
    farther = TEACHER - 5
    assert float(residual_loss([OUTPUT], [TEACHER], [farther, given])) == pytest.approx(5 / 4)
    assert float(residual_loss([OUTPUT], [TEACHER], [torch.ones(3, 2)])) == pytest.approx(5 / 50)
    other = torch.full((1, 3), 2.0)  # a stream of another shape: misses 3 squared of 12, and counts alike
    assert float(residual_loss([OUTPUT, other + 1], [TEACHER, other], [given])) == pytest.approx((5 / 4 + 3 / 12) / 2)
    with pytest.raises(ValueError):
        residual_loss([OUTPUT], [TEACHER, other], [])


def test_the_score_loss_is_the_mean_over_heads_of_the_papers_formula():
    scores = torch.tensor([[[[0.0, math.log(2.0)]], [[math.log(3.0), float("-inf")]]]])  # exp: 1, 2 and 3, 0
    products = torch.tensor([[[[0.0, 4.0]], [[3.0, 0.0]]]])
    assert float(score_loss(scores, products)) == pytest.approx((math.log(1 + 1 + 4) + math.log(1)) / 2)


def test_energies_of_calls_add_up():
    first, second = energies(OUTPUT, TEACHER), energies(OUTPUT[:1], TEACHER[:1])
    assert first == (5, 50) and second == (1, 25)
    both = energies(torch.cat([OUTPUT, OUTPUT[:1]]).half(), torch.cat([TEACHER, TEACHER[:1]]).half())
    assert both == (6, 75)
