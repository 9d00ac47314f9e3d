"""Stage 0: the best matrix per head behind an attention output, in closed form, from a few samples.

For the outputs y of a candidate and t of the teacher, rows of one head, the matrix is

    A = (Y^T Y + r I)^-1 (Y^T T + r I),   r = RIDGE mean(diag(Y^T Y)),

ridge regression that shrinks to the identity. No gradient, nothing is kept but two D x D sums per head.
"""

import torch
from torch import Tensor

RIDGE = 1e-3


class OutputFit:
    """The sums of one candidate, added up call by call.

    Args:
        num_heads, head_dim: of the site.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.own = torch.zeros(num_heads, head_dim, head_dim, dtype=torch.float64)
        self.cross = torch.zeros_like(self.own)

    def add(self, output: Tensor, teacher: Tensor) -> None:
        """Add rows of a call, (B, H, M, D) each; a call with an infinity or NaN tells nothing and is left out."""
        own, target = (each.detach().float() for each in (output, teacher))
        if not bool(torch.isfinite(own).all() & torch.isfinite(target).all()):
            return
        self.own += torch.einsum("bhmi,bhmj->hij", own, own).cpu()
        self.cross += torch.einsum("bhmi,bhmj->hij", own, target).cpu()

    def solve(self) -> Tensor:
        """Return the matrices, (H, D, D) fp32; the identity for a head that gave nothing."""
        size = self.own.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        identity = torch.eye(self.own.shape[-1], dtype=self.own.dtype)
        ridge = (RIDGE * size).clamp_min(torch.finfo(self.own.dtype).tiny ** 0.5) * identity
        return torch.linalg.solve(self.own + ridge, self.cross + ridge).float()
