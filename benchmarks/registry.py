"""What is measured: cases as data. `contenders.py` has the functions that are timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.attention import ClearSpec, Segment, TokenLayout, grid_segment
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
        width: of the picture in pixels; one token is 16 pixels.
        text: number of text tokens.
        heads, head_dim, batch: H, D and B.
        dtype: name of a torch dtype.
        height: of the picture in pixels; 0 is a square.
    """

    width: int
    text: int = 512
    heads: int = 1
    head_dim: int = 128
    batch: int = 1
    dtype: str = "float32"
    height: int = 0

    @property
    def pixels(self) -> str:
        """The size as stored rows name it: "1024", or "1216x832"."""
        return f"{self.width}x{self.height}" if self.height else str(self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (self.height or self.width) // TOKEN_PIXELS, self.width // TOKEN_PIXELS

    @property
    def layout(self) -> TokenLayout:
        """The tokens: text, then the picture."""
        return TokenLayout.of((Segment("text", self.text), grid_segment("main", 1, *self.grid)))

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


@dataclass(frozen=True, slots=True)
class Suite:
    """What is timed in turns in one process.

    Args:
        shapes: the calls.
        specs: what each windowed contender runs.
        dense, windowed: names in `contenders.py`.
        backward: time forward and backward together.
    """

    shapes: tuple[Shape, ...]
    specs: tuple[ClearSpec, ...]
    dense: tuple[str, ...]
    windowed: tuple[str, ...]
    backward: bool = False


def _flux(width: int, text: int = 512, batch: int = 1, height: int = 0) -> Shape:
    return Shape(width, text, 24, 128, batch, "bfloat16", height)


RADII = (ClearSpec(8), ClearSpec(16), ClearSpec(32))
POOLED = (ClearSpec(8, down_factor=4), ClearSpec(16, down_factor=4))
DENSE = ("dense cudnn", "dense flash", "sage")
WINDOWED = ("triton", "clear", "flex raster", "flex tiles", "natten")
SUITES: dict[str, Suite] = {
    "clear-cpu": Suite((Shape(1024), Shape(2048)), RADII, ("dense",), ("clear",)),
    "clear-gpu": Suite(
        (_flux(1024), _flux(1024, 256), _flux(1216, height=832), _flux(2048), _flux(2048, 256), _flux(4096)),
        RADII, DENSE, WINDOWED,
    ),
    "clear-gpu-8k": Suite((_flux(8192),), RADII, ("dense cudnn",), ("triton", "flex raster")),
    "clear-gpu-pooled": Suite((_flux(1024), _flux(2048), _flux(4096)), POOLED, ("dense cudnn",), ("triton", "clear")),
    "clear-gpu-training": Suite(
        (_flux(1024, batch=2), _flux(2048, batch=2)), RADII, ("dense cudnn", "dense flash"), ("triton", "clear"), True
    ),
    "clear-gpu-ablation": Suite(
        (_flux(1024), _flux(4096)), RADII, ("dense cudnn",), ("triton", "no masks", "no gather")
    ),
}  # fmt: skip


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
    mask[0, 1] = float("-inf")  # a mask that hides nothing would not be declined
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
