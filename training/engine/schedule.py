"""Learning rates and draws as functions of the update's number alone, so that a resumed run repeats them."""

import hashlib
import math
from collections.abc import Sequence

import torch

from .protocols import Draw


def rate_at(update: int, num_updates: int, warmup: int, floor: float = 0.01) -> float:
    """Return the factor on the learning rate: a linear warm-up, then half a cosine down to `floor`."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, num_updates - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def generator(*names: object) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on `names` only."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def training_draw(seed: int, number: int, samples: Sequence[int], has_negative: bool, levels: str = "even") -> Draw:
    """Return the `number`-th draw of a run.

    Each pass over the samples takes them in an order of its own. Negative prompts take turns with positive ones, since
    guidance weighs both.

    Args:
        samples: numbers of those that are trained on.
        levels: how noise levels are drawn, see `FinetuneRecipe`.
    """
    pass_number, place = divmod(number, len(samples))
    order = torch.randperm(len(samples), generator=generator(seed, "order", pass_number))
    random = generator(seed, "draw", number)
    percent = torch.rand((), generator=random, dtype=torch.float64).item()
    if levels == "middle":
        percent = torch.sigmoid(torch.randn((), generator=random, dtype=torch.float64)).item()
    noise = int(torch.randint(2**62, (), generator=random))
    negative = has_negative and number % 2 == 1
    return Draw(samples[int(order[place])], _inside(percent), noise, negative, levels == "unshifted")


def held_out_draws(seed: int, samples: Sequence[int], count: int, has_negative: bool) -> list[Draw]:
    """Return `count` draws of samples that are not trained on, their noise levels spread evenly."""
    noise = [int(torch.randint(2**62, (), generator=generator(seed, "held out", i))) for i in range(count)]
    return [
        Draw(samples[i % len(samples)], _inside((i + 0.5) / count), noise[i], has_negative and i % 2 == 1)
        for i in range(count)
    ]


def split_samples(num_samples: int, share: float = 0.1) -> tuple[list[int], list[int]]:
    """Return the numbers of the samples to train on and of those held out: the last tenth, at least one.

    A single sample is both: its held-out draws have noise of their own.
    """
    held = max(1, round(num_samples * share)) if num_samples > 1 else 0
    kept = list(range(num_samples - held))
    return kept, list(range(num_samples - held, num_samples)) or kept


def _inside(percent: float) -> float:
    return min(max(percent, 0.002), 0.98)  # at the ends there is nothing to predict, or nothing to see
