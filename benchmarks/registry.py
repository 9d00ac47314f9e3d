"""What is measured: cases as data, and the functions that run them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.attention import ClearSpec, Segment, TokenLayout, clear_attention, grid_segment
from linearize.attention.hosts.flux import FluxHost
from linearize.attention.memory import LongLived
from linearize.attention.runtime import (
    CALL_KEY,
    RUNTIME_KEY,
    AttentionOverride,
    CallFacts,
    Runtime,
    SiteSettings,
    expect_declines,
)

TOKEN_PIXELS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call of a FLUX-like picture.

    Args:
        pixels: side of the picture; one token is 16 pixels.
        text: number of text tokens.
        heads, head_dim, batch: H, D and B.
        dtype: name of a torch dtype.
    """

    pixels: int
    text: int = 512
    heads: int = 1
    head_dim: int = 128
    batch: int = 1
    dtype: str = "float32"

    @property
    def layout(self) -> TokenLayout:
        side = self.pixels // TOKEN_PIXELS
        return TokenLayout.of((Segment("text", self.text), grid_segment("main", 1, side, side)))

    def inputs(self, device: str, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return random query, key and value, (B, H, N, D); zeros would run faster than real data."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.heads, self.layout.num_tokens, self.head_dim)
        dtype = getattr(torch, self.dtype)
        query, key, value = (
            torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(requires_grad)
            for _ in range(3)
        )
        return query, key, value


# suite: shapes and radii that are timed against dense attention in one run
SUITES: dict[str, tuple[tuple[Shape, ...], tuple[int, ...]]] = {
    "clear-cpu": ((Shape(1024), Shape(2048)), (8, 16, 32)),
    "clear-gpu": (
        tuple(Shape(pixels, heads=24, dtype="bfloat16") for pixels in (1024, 2048, 4096)),
        (8, 16, 32),
    ),
}


def contenders(shape: Shape, radii: tuple[int, ...], device: str) -> dict[str, Callable[[], Tensor]]:
    """Return name: function for dense attention and CLEAR at each radius, on the same inputs."""
    query, key, value = shape.inputs(device)
    layout, memory = shape.layout, LongLived()

    def clear(radius: int) -> Callable[[], Tensor]:
        return lambda: clear_attention(query, key, value, layout, ClearSpec(radius), memory=memory)

    dense: dict[str, Callable[[], Tensor]] = {"dense": lambda: F.scaled_dot_product_attention(query, key, value)}
    return dense | {f"clear r={radius}": clear(radius) for radius in radii}


def declined_calls() -> dict[str, Callable[[], object]]:
    """Return name: function for one attention call that the override leaves to the host, and for the host alone."""
    query = torch.zeros(1, 1, 16, 8)
    result = torch.zeros(1, 16, 8)
    layout = TokenLayout.of((grid_segment("main", 1, 4, 4),))
    settings = SiteSettings(ClearSpec(2), min_tokens=17)
    runtime = Runtime(FluxHost(), {"double.0": settings}, LongLived())
    override = AttentionOverride()

    def host(*args: object, **kwargs: object) -> Tensor:
        return result

    mask = torch.zeros(16, 16)
    options = {"block_type": "double", "block_index": 0, RUNTIME_KEY: runtime, CALL_KEY: CallFacts(layout, None)}
    other = {**options, "block_type": "refiner"}
    willing = Runtime(FluxHost(), {"double.0": SiteSettings(ClearSpec(2))}, LongLived())
    always = {**options, RUNTIME_KEY: willing}

    def masked(*args: object, **kwargs: object) -> object:
        with expect_declines("mask"):
            return override(*args, skip_reshape=True, **kwargs)

    return {
        "host alone": lambda: host(query, query, query, 1, mask=None, skip_reshape=True, transformer_options=options),
        "other call": lambda: override(host, query, query, query, 1, skip_reshape=True, transformer_options=other),
        "left to host": lambda: override(host, query, query, query, 1, skip_reshape=True, transformer_options=options),
        "declined": lambda: masked(host, query, query, query, 1, mask=mask, transformer_options=always),
    }
