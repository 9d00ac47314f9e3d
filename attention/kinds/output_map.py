"""A matrix per head behind a site's attention: what the new kind misses on average, put back in one product.

Attention outputs of a cheaper kind are off in ways that a linear map per head can mend, and the best such map has a
closed form (`training/transfer/closed_form.py`). It acts on grid tokens only; global ones have dense attention already.
"""

from torch import Tensor

from ..layout import TokenLayout


def map_outputs(output: Tensor, layout: TokenLayout, matrices: Tensor) -> Tensor:
    """Return an attention output whose grid tokens were multiplied by their head's matrix from the right.

    Shapes: output (B, H, N, D), not changed. matrices (H, D, D), any device. Returns (B, H, N, D) in output's dtype.
    """
    matrices = matrices.to(output.device, output.dtype)
    if not layout.global_ranges:
        return output @ matrices
    tokens = layout.grid_tokens(output.device)
    return output.index_copy(2, tokens, output.index_select(2, tokens) @ matrices)
