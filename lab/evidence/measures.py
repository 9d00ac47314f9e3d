"""How far a student is from its teacher: velocities by noise level, pictures, and features of pictures."""

from typing import Any

import torch
from torch import Tensor

LEVELS = (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)  # noise levels (sigma) at which velocities are compared
VELOCITY_PICTURES = 4


def velocities(
    laboratory: Any, model: Any, clean: Tensor, captions: list[str] | None = None, noise_seed: int = 0
) -> Tensor:
    """Return the velocities that a model predicts from noised pictures, (picture, level, 16, ...), fp32 on the CPU.

    Args:
        model: a model patcher, the teacher's or a student's.
        clean: (B, 16, ...) latents as ComfyUI's nodes pass them on.
        captions: of these latents; None are the first of the test.
        noise_seed: of the first picture; each further one has the next.
    """

    def ask(call: Any, noise: Tensor, latent: Tensor) -> Tensor:
        seen = []
        for level in LEVELS:
            noisy = torch.lerp(latent, noise, level)
            seen.append((noisy - call(noisy, noise.new_full((len(noise),), level))) / level)
        return torch.stack(seen, dim=1).float().cpu()

    found = []
    for number, positive in enumerate(laboratory.conditionings(captions)[: len(clean)]):
        latent = clean[number : number + 1]
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(noise_seed + number))
        found.append(laboratory.ask(model, positive, noise, latent, ask))
    return torch.cat(found)


def relative_error(student: Tensor, teacher: Tensor) -> tuple[float, list[float]]:
    """Return the energy of what a student's velocities miss over the teacher's: over all, and level by level.

    Shapes: both (picture, level, 16, ...), as `velocities` returns them.
    """
    dims = [dim for dim in range(student.ndim) if dim != 1]
    missed, whole = (student - teacher).square().sum(dims), teacher.square().sum(dims)
    return float(missed.sum() / whole.sum()), (missed / whole).tolist()


def picture_scores(laboratory: Any, pictures: Tensor, teacher: Tensor) -> dict[str, float]:
    """Return PSNR and SSIM to the teacher's pictures, means over (B, H, W, 3)."""
    measured, _ = laboratory.module("nodes.picture_metrics").compare(pictures, teacher)
    return {"psnr": float(measured.psnr.clamp(max=99).mean()), "ssim": float(measured.ssim.mean())}


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two sets of features (B, F): of Gaussians with their means and covariances.

    Source: Heusel et al., 2017; a fifth of the mean variance is added to the diagonals, since sets are small.
    """
    first, second = first.double(), second.double()
    ridge = 0.2 * torch.cat((first, second)).var(0).mean() * torch.eye(first.shape[1], dtype=torch.float64)
    one, other = (torch.cov(each.T) + ridge for each in (first, second))
    root = _root(one)
    both = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    mean = (first.mean(0) - second.mean(0)).square().sum()
    return float(mean + one.trace() + other.trace() - 2 * both)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
