"""Losses of distillation, and the errors that are reported.

All compare a student's tensor with the teacher's. Each is divided by the teacher's own size, so that sites and noise
levels weigh alike; energies are mean squares.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-12  # of an energy


def value_loss(output: Tensor, teacher: Tensor) -> Tensor:
    """Return the L1 distance of attention outputs, before the output projection, over the teacher's mean size.

    Shapes: both (..., D). Source: Attention Surgery (arXiv 2509.24899), its value loss; the division is ours.
    """
    teacher = teacher.float()
    return (output.float() - teacher).abs().mean() / teacher.abs().mean().clamp_min(FLOOR)


def squared_loss(output: Tensor, teacher: Tensor) -> Tensor:
    """Return the energy of what the output misses over the teacher's energy, of tensors of one shape."""
    teacher = teacher.float()
    return (output.float() - teacher).square().mean() / teacher.square().mean().clamp_min(FLOOR)


def residual_loss(outputs: Sequence[Tensor], teachers: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return what a block's outputs miss over the energy of what the teacher's block added to its inputs.

    The mean over the block's streams, such as text and image; they count alike.

    Args:
        outputs, teachers: of the student's block and the teacher's, stream by stream.
        inputs: tensors that both were given. A stream's own is the nearest of its shape; without one, the block adds
            everything.
    """
    losses = []
    for output, teacher in zip(outputs, teachers, strict=True):
        teacher = teacher.float()
        alike = [each.float() for each in inputs if each.shape == teacher.shape]
        added = min(((teacher - each).square().mean() for each in alike), default=teacher.square().mean())
        losses.append((output.float() - teacher).square().mean() / added.clamp_min(FLOOR))
    return torch.stack(losses).mean()


def score_loss(scores: Tensor, products: Tensor) -> Tensor:
    """Return log(1 + |exp(scores) - products|^2), averaged over batch and heads.

    Args:
        scores: (B, H, M, K), scaled q . k; callers subtract what their kind of attention subtracts.
        products: (B, H, M, K), phi_q(q) . phi_k(k).

    Source: Attention Surgery (arXiv 2509.24899), its attention-score loss.
    """
    return torch.log1p((scores.float().exp() - products.float()).square().sum((-1, -2))).mean()


def energies(output: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Return the energy of what the output misses and the teacher's, as sums that add up over calls."""
    teacher = teacher.float()
    missed, whole = ((each.square().sum(-1).cpu().double().sum()) for each in (output.float() - teacher, teacher))
    return float(missed), float(whole)
