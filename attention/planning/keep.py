"""Foveated specs from one number: the share of a picture's keys that each query sees."""

from ..specs import FoveatedSpec

LEAST_KEEP = 0.02
CLIP_FRAMES = 5  # of a tile: long in time and small in space errs least at equal keys


def spec_of_keep(
    keep: float,
    is_clip: bool,
    radius: int = 1,
    top: float = -1.0,
    tile: int = 0,
    frames: int = 0,
    levels: int = 1,
    *,
    on_gpu: bool = False,
) -> FoveatedSpec:
    """Return the spec whose queries see about a share of the image's keys, exact ones and means together.

    Small tiles err least as long as their means leave room for exact keys; 1 in 16 (clips: 20) is a mean then. On a GPU
    they are predicted to cost more than dense up to 2048 pixels (lab/benchmarks/gpu.md), so tiles are twice as wide.

    Args:
        keep: the share, above the share of the means of large tiles.
        is_clip: whether the model makes clips.
        radius, levels: as in the spec.
        top: as in the spec; below 0 it follows from `keep`.
        tile, frames: as in the spec; 0 takes what suits `keep`, the model and the device.
        on_gpu: whether it runs on a GPU.
    """
    frames = frames or (CLIP_FRAMES if is_clip else 1)
    if not tile:
        small, large = (2, 4) if is_clip else (4, 8)
        tile = small if not on_gpu and keep >= 1.5 / (small**2 * (frames if is_clip else 1)) else large
    means = 1 / (tile**2 * (frames if is_clip else 1))
    if top < 0:
        top = round(min(1.0, max((keep - means) / (1 - means), 0.0)), 4) if means < 1 else 1.0
    return FoveatedSpec(radius, top, tile, frames, levels)
