"""The estimate of memory: what counts, and what it says. That it is near the truth is tested on ComfyUI's models."""

from dataclasses import replace

from linearize.training.finetune.estimate import Estimate, estimate

FLUX = {"num_tokens": 4608, "width": 3072, "num_blocks": 57, "optimizer": "adamw", "has_average": True}
GIB = 2**30


def needed(base=12 * 10**9, trained=67 * 10**6, checkpointing=True, **changes):
    return estimate(base, trained, **{**FLUX, **changes}, checkpointing=checkpointing)


def test_trained_weights_count_with_gradients_moments_and_average():
    assert needed(trained=1000).trained == 1000 * (4 + 4 + 8 + 4)
    assert needed(trained=1000, has_average=False, optimizer="adamw_8bit").trained == 1000 * (4 + 4 + 2)


def test_checkpointing_keeps_inputs_and_one_block():
    """Of FLUX at 1024 x 1024, 57 inputs of 28 MB, as training without it would keep ten times as much and more."""
    kept = needed().activations
    assert 57 * 28e6 < kept < 57 * 28e6 + 1e9
    assert needed(checkpointing=False).activations > 10 * kept


def test_weights_that_are_cast_are_kept_with_the_activations():
    cast = 12 * 10**9
    assert needed(checkpointing=False, num_cast=cast).activations - needed(checkpointing=False).activations > 1.9 * cast
    assert needed(num_cast=cast).activations - needed().activations == cast * 2 // 57


def test_the_text_names_the_parts_and_warns():
    some = Estimate(12 * GIB, GIB, 2 * GIB)
    assert some.text() == ("needs about 15.0 GiB: model 12.0 GiB, trained weights 1.0 GiB, activations 2.0 GiB")
    assert some.text(24 * GIB).endswith("2.0 GiB; 24.0 GiB are free")
    assert "that may not suffice, lower rank" in some.text(14 * GIB)
    assert "trained weights 5.0 MiB" in replace(some, trained=5 * 2**20).text()
