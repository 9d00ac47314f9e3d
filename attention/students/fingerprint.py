"""Fingerprints of base models: a few hundred norm weights, and their distance.

Norm weights, because every variant of a base carries them, quantised ones and LoRA merges included. It only informs;
whether a student fits a model is decided by shapes, in `attention/students/file.py`. Whether two models are one, to the
bit, is known from a digest of some values of every weight.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from .tensor_values import tensor_bytes

NUM_SITES = 8
VALUES_PER_SITE = 32
LENGTH = NUM_SITES * VALUES_PER_SITE
SAME_BASE = 0.08  # above what copies in 8 bits are apart, see `match`
FINE_TUNE = 0.20
RUNS, RUN_LENGTH = 16, 32  # of neighbouring values of a weight that its digest reads

Match = Literal["same", "fine-tune", "other"]


def fingerprint(parameters: Sequence[Tensor]) -> Tensor:
    """Return values spread evenly over norm weights: 32 of each of 8, the first and the last included.

    Args:
        parameters: norm weights in the order of the sites, any float dtype, shape and device; weights and values are
            repeated where there are fewer than 8 or 32.

    Returns:
        (256,) in fp32 on the CPU.

    Raises:
        ValueError: there are no parameters, or one has no values.
    """
    if not parameters:
        raise ValueError("a fingerprint is made of at least one norm weight, got none")
    rows = []
    for number in _spread(NUM_SITES, len(parameters)):
        # float8 cannot be indexed everywhere, and norm weights are small
        values = parameters[number].detach().float().reshape(-1)
        if not values.numel():
            raise ValueError(f"a norm weight holds at least one value, number {number} of {len(parameters)} has none")
        rows.append(values[_spread(VALUES_PER_SITE, values.numel())].cpu())
    return torch.cat(rows)


def distance(found: Tensor, stored: Tensor) -> float:
    """Return |found - stored| / |stored|; infinite where only `stored` is zero.

    Args:
        found: (256,) fingerprint of the model at hand.
        stored: (256,) fingerprint in the file.

    Raises:
        ValueError: one has another shape.
    """
    if found.shape != (LENGTH,) or stored.shape != (LENGTH,):
        raise ValueError(
            f"fingerprints have {LENGTH} values each, got shapes {tuple(found.shape)} and {tuple(stored.shape)}"
        )
    stored = stored.detach().cpu().double()
    apart, size = float((found.detach().cpu().double() - stored).norm()), float(stored.norm())
    if size == 0.0:
        return 0.0 if apart == 0.0 else float("inf")
    return apart / size


def match(found: Tensor, stored: Tensor) -> Match:
    """Return whether the model is the one a file was made for ("same"), a "fine-tune" of it, or an "other" one.

    "same" is a distance below 8 %, "fine-tune" below 20 %; NaN is "other".

    Notes:
        Copies of one base must be the same. Largest distance of weights from 0.9..1.1, 0.5..2 and 0.1..4 to their
        copy, 200 draws of 256 each: fp16 0.03 %, bf16 0.2 %, e4m3fn 3.3 %, e5m2 5.3 %, and 7.0 % between a copy in
        e4m3fn and one in e5m2; so the 2 % that suffice for 16 bits would call every 8-bit copy a fine-tune. Unrelated
        weights from 0.5..2 are 46 % apart.
    """
    apart = distance(found, stored)
    if apart < SAME_BASE:
        return "same"
    return "fine-tune" if apart < FINE_TUNE else "other"


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of names, dtypes, shapes and 512 values of each weight, or of all that it has.

    Args:
        weights: by name, in any order, dtype and place; packed ones count by the bytes that they are stored as.

    Notes:
        A weight is cut into 16 parts, and each is read in one run of 32 values at a place drawn from the weight's name:
        a change of an eighth of a weight is seen wherever it lies, and a model of 12 B parameters costs a few MB of
        reading. Two copies of one file are equal; the same weights in another dtype are not.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda each: each[0]):
        for part, stored in _stored(name, weight.detach()):
            digest.update(json.dumps([part, str(stored.dtype), list(stored.shape)]).encode())
            digest.update(tensor_bytes(_sampled(part, stored)))
    return digest.hexdigest()


def _stored(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a weight consists of."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        yield name, weight.as_subclass(Tensor)
        return
    for part in flatten()[0]:
        yield from _stored(f"{name}.{part}", getattr(weight, part).detach())


def _sampled(name: str, weight: Tensor) -> Tensor:
    """Return the values of a weight that count, as bytes, on its device."""
    flat = weight.reshape(-1)
    values = flat.view(torch.uint8).view(flat.numel(), -1) if flat.numel() else flat.to(torch.uint8)
    if len(values) <= RUNS * RUN_LENGTH:
        return values
    part = len(values) // RUNS
    places = random.Random(name)  # noqa: S311 - equal on every machine is what it is for
    starts = [number * part + places.randrange(part - RUN_LENGTH + 1) for number in range(RUNS)]
    rows = torch.tensor(starts).unsqueeze(1) + torch.arange(RUN_LENGTH)
    return values[rows.reshape(-1).to(values.device)]


def _spread(count: int, length: int) -> list[int]:
    """Return `count` positions spread evenly over 0..length - 1, both ends included."""
    return [number * (length - 1) // (count - 1) for number in range(count)]
