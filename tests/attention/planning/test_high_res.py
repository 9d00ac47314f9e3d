"""CLEAR's recipe for large pictures: noise levels, the scale of every window, and what is said of both."""

import pytest

from linearize.attention.planning.high_res import (
    HighResRecipe,
    describe_recipe,
    high_res_sigmas,
    size_note,
    with_proportional_scale,
)
from linearize.attention.specs import ClearSpec, DenseSpec, HybridSpec, LinearSpec, radius_per_head

PAPER = [0.875, 0.848, 0.818, 0.786, 0.75, 0.711, 0.667, 0.618, 0.563, 0.5, 0.429, 0.346, 0.25, 0.136, 0]
SIGMAS = high_res_sigmas(20, 0.7, 3.0).tolist()


def test_the_noise_levels_are_the_papers():
    assert pytest.approx(PAPER, abs=5.1e-4) == SIGMAS


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("shift", [0.5, 1.0, 10.0])
def test_noise_levels_fall_to_zero(steps, strength, shift):
    sigmas = high_res_sigmas(steps, strength, shift)
    assert len(sigmas) == steps - int(steps - steps * strength) + 1
    assert bool((sigmas.diff() < 0).all()) and sigmas[-1] == 0 and sigmas[0] <= 1
    assert strength < 1 or sigmas[0] == 1


def test_a_shift_of_one_leaves_the_levels_evenly_spaced():
    assert high_res_sigmas(4, 1.0, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_a_shift_of_ten_starts_where_the_paper_says():
    assert float(high_res_sigmas(20, 0.7, 10.0)[0]) == pytest.approx(0.959, abs=5e-4)


@pytest.mark.parametrize(("steps", "strength", "shift"), [(0, 0.7, 3.0), (20, 0.0, 3.0), (20, 1.1, 3.0), (20, 0.7, 0)])
def test_numbers_out_of_range_are_one_sentence(steps, strength, shift):
    with pytest.raises(ValueError, match=f"got steps={steps}, strength={strength}, shift={shift}"):
        high_res_sigmas(steps, strength, shift)


def test_every_window_of_a_plan_gets_the_scale_and_nothing_else_changes():
    scaled = ClearSpec(3, proportional=True)
    assert with_proportional_scale(ClearSpec(3)) == scaled and with_proportional_scale(scaled) == scaled
    for spec in (DenseSpec(), LinearSpec(), HybridSpec(3)):
        assert with_proportional_scale(spec) == spec
    split = with_proportional_scale(radius_per_head((3, 5, 3)))
    assert split == radius_per_head((3, 5, 3), ClearSpec(1, proportional=True))


def described(specs, num_tokens):
    return describe_recipe(HighResRecipe(), SIGMAS, 100_000, {str(n): spec for n, spec in enumerate(specs)}, num_tokens)


def test_what_is_said_of_the_recipe_at_a_size():
    """The paper's factors at 2048 x 2048 and 512 text tokens."""
    first = ["14 of 20 steps, from sigma 0.875", "RoPE base 100,000"]
    plain, pooled = ClearSpec(8, proportional=True), ClearSpec(8, down_factor=4, proportional=True)
    assert described([plain, DenseSpec(), plain], 16896) == [*first, "proportional scale x 1.074"]
    assert described([pooled, radius_per_head((3, 5), plain)], 16896) == [*first, "proportional scale x 1.074, 1.195"]
    for dense in ([], [DenseSpec(), LinearSpec()]):
        assert described(dense, 16896)[:2] == first and "no site runs on clear" in described(dense, 16896)[2]


def test_below_the_size_of_training_the_scale_sharpens_nothing():
    spec = ClearSpec(8, proportional=True)
    for tokens in (4607, 4608):
        words = f"{tokens:,} tokens: the proportional scale sharpens only above 4,608, make the picture larger"
        assert described([spec], tokens)[2] == words
    assert described([spec], 4609)[2] == "proportional scale x 1.000"


def test_sizes_are_made_of_whole_tokens():
    assert size_note(2048, 1024) is None and size_note(16, 48) is None
    assert size_note(2049, 2048) == "2049 x 2048 is not made of whole tokens of 16 pixels; use 2064 x 2048"
    assert "use 2048 x 1040" in (size_note(2048, 1025) or "")
