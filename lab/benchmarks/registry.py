"""What is measured: cases as data. `contenders.py` has the functions that are timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.attention import (
    ChunkedSpec,
    ClearSpec,
    DenseSpec,
    HybridSpec,
    LinearSpec,
    Segment,
    TokenLayout,
    grid_segment,
)
from linearize.attention.hosts.flux import FluxHost
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import (
    CALL_KEY,
    RUNTIME_KEY,
    ForwardFacts,
    Runtime,
    SiteSettings,
    expect_declines,
)
from linearize.attention.specs import FoveatedSpec, Spec

TOKEN_PIXELS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call of a picture or of a video.

    Args:
        width: in pixels; one token is 16 pixels a side.
        text: number of text tokens, before the grid.
        heads, head_dim, batch: H, D and B.
        dtype: name of a torch dtype.
        height: in pixels; 0 is a square.
        frames: latent frames; 1 is a picture.
    """

    width: int
    text: int = 512
    heads: int = 1
    head_dim: int = 128
    batch: int = 1
    dtype: str = "float32"
    height: int = 0
    frames: int = 1

    @property
    def pixels(self) -> str:
        """The size as stored rows name it: "1024", or "1216x832"."""
        return f"{self.width}x{self.height}" if self.height else str(self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, of each frame."""
        return (self.height or self.width) // TOKEN_PIXELS, self.width // TOKEN_PIXELS

    @property
    def layout(self) -> TokenLayout:
        """The tokens: text, then the frames."""
        return TokenLayout.of((Segment("text", self.text), grid_segment("main", self.frames, *self.grid)))

    def inputs(self, device: str, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return random query, key and value, (B, H, N, D); zeros would run faster than real data."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.heads, self.layout.num_tokens, self.head_dim)
        options = {"dtype": getattr(torch, self.dtype), "device": device, "requires_grad": requires_grad}
        query, key, value = (torch.randn(shape, generator=generator, **options) for _ in range(3))
        return query, key, value


@dataclass(frozen=True, slots=True)
class Suite:
    """What is timed in turns in one process.

    Args:
        shapes: the calls.
        specs: what each runner runs.
        dense, runners: names in `contenders.py`.
        backward: time forward and backward together.
    """

    shapes: tuple[Shape, ...]
    specs: tuple[Spec, ...]
    dense: tuple[str, ...]
    runners: tuple[str, ...]
    backward: bool = False

    @property
    def contenders(self) -> dict[str, tuple[str, Spec]]:
        """What is timed, by the name of its rows: a name in `contenders.py`, and the spec."""
        dense = {each: (each, DenseSpec()) for each in self.dense}
        return dense | {f"{each} {label(spec)}": (each, spec) for spec in self.specs for each in self.runners}


@dataclass(frozen=True, slots=True)
class StreamSuite:
    """Peak memory of a causal clip that is whole at once, or arrives chunk by chunk (`peaks.py`).

    Args:
        shape: of a clip; its frames do not matter.
        frames: latent frames of the clips.
        spec: causal.
    """

    shape: Shape
    frames: tuple[int, ...] = (6, 12, 24, 48, 96)
    spec: ChunkedSpec = ChunkedSpec(causal=True)


def label(spec: Spec) -> str:
    """Return a spec as stored rows name it: "r=8 d=4", "linear hedgehog f=64", "hybrid polynomial rate=2 lse"."""
    if isinstance(spec, ClearSpec):
        return f"r={spec.radius}" + (f" d={spec.down_factor}" if spec.down_factor > 1 else "")
    if isinstance(spec, DenseSpec):
        return spec.kind
    if isinstance(spec, FoveatedSpec):
        return f"foveated r={spec.radius} top={spec.top:g} tile={spec.tile} levels={spec.levels}"
    words = [spec.kind, spec.feature_map, f"f={spec.feature_dim}" if spec.feature_dim else ""]
    if isinstance(spec, HybridSpec):
        words += [f"rate={spec.rate}", spec.stabilizer if spec.stabilizer != "max" else ""]
    if isinstance(spec, ChunkedSpec):
        words += [f"{spec.chunk_frames}+{spec.overlap_frames}", "causal" if spec.causal else ""]
    return " ".join(word for word in words if word)


def _flux(width: int, text: int = 512, batch: int = 1, height: int = 0) -> Shape:
    return Shape(width, text, 24, 128, batch, "bfloat16", height)


def _wan(width: int, height: int, heads: int = 12, frames: int = 21) -> Shape:
    return Shape(width, 0, heads, 128, 1, "bfloat16", height, frames)


RADII = (ClearSpec(8), ClearSpec(16), ClearSpec(32))
POOLED = (ClearSpec(8, down_factor=4), ClearSpec(16, down_factor=4))
DENSE = ("dense cudnn", "dense flash", "sage")
WINDOWED = ("triton", "clear", "flex raster", "flex tiles", "natten")
# keep 0.1 on tiles of 64 and of 16 queries, and by distance alone
FOVEATED = (
    FoveatedSpec(1, 0.08, 8),
    FoveatedSpec(1, 0.04, 4),
    FoveatedSpec(8, 0.0, 8, levels=3),
)
FOVEATED_CPU = (
    FoveatedSpec(1, 0.0857, 8),
    FoveatedSpec(1, 0.0146, 8),
    FoveatedSpec(8, 0.0, 8, levels=5),
)  # keep 0.1, 0.03
EXACT_DENSE = ("dense cudnn", "dense flash")
RATES = (2, 4, 8)
HYBRIDS = tuple(HybridSpec(rate, stabilizer=stabilizer) for rate in RATES for stabilizer in ("max", "lse"))
# elu1 is part of the kernels, and has no stabilizer; what polynomial takes more is the price of a map in PyTorch
FUSED_HYBRIDS = tuple(HybridSpec(rate, "elu1") for rate in RATES)
CHUNKED = (ChunkedSpec(), ChunkedSpec(causal=True))
FUSED_CHUNKED = (ChunkedSpec(feature_map="elu1"), ChunkedSpec(causal=True, feature_map="elu1"))
WAN_480P, WAN_720P = _wan(832, 480), _wan(1280, 720)  # 81 frames: 32,760 and 75,600 tokens; 12 heads as in 1.3B
FEATURES = (LinearSpec("elu1"), *(LinearSpec("hedgehog", number) for number in (64, 128, 256, 384)), LinearSpec())
STUDENTS = (LinearSpec(), HybridSpec(4), LinearSpec("hedgehog"))
SUITES: dict[str, Suite] = {
    "clear-cpu": Suite((Shape(1024), Shape(2048)), RADII, ("dense",), ("clear",)),
    "foveated-cpu": Suite((Shape(1024), Shape(2048), Shape(4096)), FOVEATED_CPU, ("dense",), ("torch",)),
    "mapped-cpu": Suite(
        tuple(Shape(832, text=0, height=480, frames=frames) for frames in (5, 21)),
        (LinearSpec(), LinearSpec("hedgehog"), *HYBRIDS, *CHUNKED), ("dense",), ("torch",),
    ),
    "update-cpu": Suite((Shape(1024),), STUDENTS, ("dense",), ("update 256", "update all")),
    "clear-gpu": Suite(
        (_flux(1024), _flux(1024, 256), _flux(1216, height=832), _flux(2048), _flux(2048, 256), _flux(4096)),
        RADII, DENSE, WINDOWED,
    ),
    "clear-gpu-8k": Suite((_flux(8192),), RADII, ("dense cudnn",), ("triton", "flex raster")),
    "clear-gpu-pooled": Suite((_flux(1024), _flux(2048), _flux(4096)), POOLED, ("dense cudnn",), ("triton", "clear")),
    "clear-gpu-training": Suite(
        (_flux(1024, batch=2), _flux(2048, batch=2)), RADII, EXACT_DENSE, ("triton", "clear"), True
    ),
    "clear-gpu-ablation": Suite(
        (_flux(1024), _flux(4096)), RADII, ("dense cudnn",), ("triton", "no masks", "no gather")
    ),
    "foveated-gpu": Suite(
        (_flux(1024), _flux(2048), _flux(4096), WAN_480P), FOVEATED, DENSE, ("triton", "torch")
    ),
    "foveated-gpu-training": Suite(
        (_flux(1024, batch=2), _flux(2048, batch=2)), FOVEATED, EXACT_DENSE, ("triton", "torch"), True
    ),
    "mapped-gpu": Suite(
        (WAN_480P, WAN_720P),
        (*FUSED_HYBRIDS, *HYBRIDS, *FUSED_CHUNKED, *CHUNKED, LinearSpec("elu1"), LinearSpec()),
        EXACT_DENSE, ("triton",),
    ),
    "mapped-gpu-torch": Suite((WAN_480P,), (*HYBRIDS, *CHUNKED, LinearSpec()), ("dense cudnn",), ("triton", "torch")),
    "mapped-gpu-flux": Suite(
        (_flux(1024), _flux(2048), _flux(4096)),
        (*FUSED_HYBRIDS, *HYBRIDS, LinearSpec("elu1"), LinearSpec()), EXACT_DENSE, ("triton",),
    ),
    "mapped-gpu-training": Suite(
        (WAN_480P,), (*FUSED_HYBRIDS, *HYBRIDS, *CHUNKED, LinearSpec()), EXACT_DENSE, ("triton",), True
    ),
    "linear-gpu": Suite(
        (WAN_480P, WAN_720P, _wan(832, 480, 40), _wan(1280, 720, 40)), FEATURES, ("dense cudnn",), ("triton", "torch")
    ),
    "update-gpu": Suite((_flux(1024), _flux(2048)), STUDENTS, EXACT_DENSE, ("update 256", "update all")),
}  # fmt: skip
STREAMS: dict[str, StreamSuite] = {
    "stream": StreamSuite(Shape(832, text=0, height=480)),
    "stream-gpu": StreamSuite(WAN_720P),
}


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
    options = {"block_type": "double", "block_index": 0, RUNTIME_KEY: runtime, CALL_KEY: ForwardFacts(layout)}
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
