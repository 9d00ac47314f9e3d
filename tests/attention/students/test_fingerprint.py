"""Fingerprints: which values they take, and that the thresholds fit copies in every precision."""

import pytest
import torch

from linearize.attention.students.fingerprint import FINE_TUNE, LENGTH, SAME_BASE, distance, fingerprint, match

COPIES = {torch.float16: 0.0003, torch.bfloat16: 0.0021, torch.float8_e4m3fn: 0.035, torch.float8_e5m2: 0.056}


def norm_weights(seed, low=0.5, high=2.0, num_sites=57, head_dim=128):
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.rand(head_dim, generator=generator, device="cpu") * (high - low) + low for _ in range(num_sites)]


def test_takes_the_first_and_the_last_site_and_value():
    weights = [torch.arange(128.0) + 1000 * site for site in range(57)]
    taken = fingerprint(weights).reshape(8, 32)
    assert taken.dtype == torch.float32 and taken.shape.numel() == LENGTH
    assert taken[:, 0].tolist() == [0, 8000, 16000, 24000, 32000, 40000, 48000, 56000]
    assert taken[0, 0] == 0 and taken[0, -1] == 127 and taken[-1, -1] == 56127
    steps = taken[0].diff()
    assert steps.min() >= 4 and steps.max() <= 5


def test_few_sites_and_values_are_repeated():
    taken = fingerprint([torch.zeros(1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])]).reshape(8, 32)
    assert taken[0].tolist() == [0.0] * 32
    assert taken[7].unique().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("parameters", "words"), [([], "at least one norm weight"), ([torch.zeros(0)], "number 0 of 1 has none")]
)
def test_nothing_to_take_from(parameters, words):
    with pytest.raises(ValueError, match=words):
        fingerprint(parameters)


@pytest.mark.parametrize("dtype", COPIES, ids=str)
@pytest.mark.parametrize("span", [(0.9, 1.1), (0.5, 2.0), (0.1, 4.0)])
def test_a_copy_in_fewer_bits_is_the_same_base(dtype, span):
    """Measured side of 2 %: the 16-bit copies lie below, both 8-bit copies above."""
    for seed in range(30):
        weights = norm_weights(seed, *span)
        base, copy = fingerprint(weights), fingerprint([weight.to(dtype) for weight in weights])
        apart = distance(copy, base)
        assert apart < COPIES[dtype]
        assert (apart < 0.02) == (dtype.itemsize == 2)
        assert match(copy, base) == match(base, copy) == "same"


def test_two_8_bit_copies_are_the_same_base():
    for seed in range(30):
        weights = norm_weights(seed, 0.9, 1.1)
        one, two = (fingerprint([w.to(d) for w in weights]) for d in (torch.float8_e4m3fn, torch.float8_e5m2))
        assert max(distance(one, two), distance(two, one)) < SAME_BASE


def test_fine_tunes_and_other_models():
    base = fingerprint(norm_weights(0))
    assert match(base, base) == "same" and distance(base, base) == 0.0
    assert match(base * 1.1, base) == "fine-tune" and distance(base * 1.1, base) == pytest.approx(0.1, rel=1e-5)
    assert match(base * (1 + FINE_TUNE + 1e-3), base) == "other"
    assert match(fingerprint(norm_weights(1)), base) == "other"
    assert distance(fingerprint(norm_weights(1)), base) == pytest.approx(0.46, abs=0.06)


def test_zero_and_nan():
    zero, nan = torch.zeros(LENGTH), torch.full((LENGTH,), float("nan"))
    assert distance(zero, zero) == 0.0
    assert distance(zero + 1, zero) == float("inf")
    assert match(nan, zero + 1) == match(zero + 1, nan) == "other"


def test_another_length_is_one_clear_sentence():
    with pytest.raises(ValueError, match=r"256 values each, got shapes \(255,\) and \(256,\)"):
        distance(torch.zeros(255), torch.zeros(256))
