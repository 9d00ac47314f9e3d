"""What `untrained.py` compares: foveated attention and its rivals, on pictures and on clips, at about equal keys."""

from dataclasses import dataclass
from typing import Any

from .rivals import DROPPED, FIRST_ORDER, MEANS, RUNS, TILES


@dataclass(frozen=True)
class Method:
    """What every site runs: a name for people, and the spec as JSON; none is dense attention."""

    name: str
    spec: dict[str, Any]


def clear(radius: int, down_factor: int = 1, temporal_radius: int = 0) -> Method:
    """Return CLEAR's windows, untrained, with pooled keys of CLEAR's own rule where `down_factor` is above 1."""
    more = f" 3-D {temporal_radius}" * bool(temporal_radius) + f" pooled {down_factor}" * (down_factor > 1)
    spec = {"kind": "clear", "radius": radius, "down_factor": down_factor, "temporal_radius": temporal_radius}
    return Method(f"clear r={radius}{more}", spec)


def foveated(name: str = "", /, **parameters: Any) -> Method:
    """Return foveated attention, named after its parameters."""
    told = " ".join(f"{key}={value:g}" for key, value in parameters.items())
    return Method(f"foveated {name or told}", {"kind": "foveated", **parameters})


FAMILIES = (  # of the figures
    "foveated, by content", "foveated, by distance", "the same tiles, rest dropped", "PISA", "Sol-Attn",
    "CLEAR's windows", "CLEAR's windows and pooled keys", "the same tiles, chosen by scores",
)  # fmt: skip


def family_of(spec: dict[str, Any]) -> str:
    """Return which of FAMILIES a method belongs to."""
    if spec["kind"] == "foveated":
        return FAMILIES[0 if spec["top"] else 1]
    if spec["kind"] == "clear":
        return FAMILIES[6 if spec["down_factor"] > 1 else 5]
    if spec.get("by_scores"):
        return FAMILIES[7]
    return FAMILIES[2 if spec["rest"] == DROPPED else 3 if spec["rest"] == FIRST_ORDER else 4]


def _rival(name: str, **parameters: Any) -> Method:
    return Method(name, {"kind": "rival", **parameters})


def dropped(top: float, side: int = 4, frames: int = 1) -> Method:
    """Return the same tiles and choice as foveated attention, without the means."""
    name = f"tiles of {side} top={top:g}, rest dropped"
    return _rival(name, cut=TILES, length=side, frames=frames, top=top, rest=DROPPED)


def by_scores(top: float, side: int = 4, frames: int = 1) -> Method:
    """Return foveated attention whose tiles are chosen by mean and deviation of their scores, whatever their values."""
    name = f"tiles of {side} top={top:g}, chosen by scores"
    return _rival(name, cut=TILES, length=side, frames=frames, top=top, by_scores=True)


def pisa(top: float, length: int = 16) -> Method:
    """Return PISA's rule on runs of `length` tokens."""
    return _rival(f"PISA runs of {length} top={top:g}", cut=RUNS, length=length, top=top, rest=FIRST_ORDER)


def sol(tau: float, length: int = 16) -> Method:
    """Return Sol-Attn's rule on runs of `length` tokens."""
    return _rival(f"Sol-Attn runs of {length} tau={tau:g}", cut=RUNS, length=length, tau=tau, band=1, rest=MEANS)


TUNED_PICTURES = (
    *(pisa(top, length) for length in (8, 16, 32) for top in (0.09, 0.19)),
    *(sol(tau, length) for length in (8, 16, 32) for tau in (1.2, 1.6, 2.0)),
    *(foveated(top=top, tile=4) for top in (0.06, 0.1, 0.21)), foveated(top=0.1, tile=4, order=1),
    foveated(top=0.21, tile=4, order=1), foveated(top=0.04, tile=3), foveated(top=0.16, tile=3),
    foveated(top=0.06, tile=4, radius=2), foveated(top=0.12, tile=8),
    *(foveated(top=0, tile=4, radius=radius, levels=levels) for radius in (2, 3) for levels in (2, 3, 4)),
    foveated(top=0.06, tile=4, radius=1, levels=2), foveated(top=0.06, tile=4, radius=1, levels=3),
)  # fmt: skip
TUNED_CLIPS = (
    *(pisa(0.19, length) for length in (8, 16, 32)),
    *(sol(tau, length) for length in (8, 16, 32) for tau in (0.6, 1.0)),
    foveated(top=0.2, tile=4, frames=1), foveated(top=0.2, tile=2, frames=5), foveated(top=0.15, tile=2, frames=3),
    foveated(top=0.12, tile=2, frames=2), foveated(top=0.2, tile=3, frames=3),
    foveated(top=0.2, tile=2, frames=5, order=1),
    foveated(top=0.29, tile=2, frames=5), foveated(top=0.29, tile=2, frames=5, order=1),
    foveated(top=0.25, tile=2, frames=3), foveated(top=0.05, tile=2, frames=1),
)  # fmt: skip
PICTURES = (
    clear(4), clear(8), clear(11), clear(7, 4), clear(4, 2), dropped(0.16), dropped(0.26),
    by_scores(0.09), by_scores(0.2),
    pisa(0.09), pisa(0.19), pisa(0.14, 8), sol(2.0), sol(1.15), sol(1.4, 8),
    foveated(top=0, tile=4, radius=2, levels=3), foveated(top=0, tile=4, radius=3, levels=3),
    foveated(top=0.06, tile=4), foveated(top=0.1, tile=4), foveated(top=0.21, tile=4),
    foveated(top=0.1, tile=4, order=1), foveated(top=0.21, tile=4, order=1),
    foveated(top=0.04, tile=3), foveated(top=0.16, tile=3), foveated(top=0.06, tile=4, radius=1, levels=2),
)  # fmt: skip
CLIPS = (
    clear(4, temporal_radius=3), clear(4), clear(5), dropped(0.22, 2, 5), dropped(0.33, 2, 5),
    by_scores(0.2, 2, 5),
    pisa(0.19), pisa(0.15, 8), pisa(0.25, 8), sol(1.0), sol(0.7, 16), sol(0.6, 8),
    foveated(top=0.2, tile=2, frames=5), foveated(top=0.29, tile=2, frames=5),
    foveated(top=0.2, tile=2, frames=5, order=1), foveated(top=0.29, tile=2, frames=5, order=1),
    foveated(top=0.15, tile=2, frames=3), foveated(top=0.25, tile=2, frames=3), foveated(top=0.2, tile=4, frames=1),
    foveated(top=0.22, tile=2, frames=5), foveated(top=0.18, tile=2, frames=3),
)  # fmt: skip
LARGE_PICTURES = (
    clear(8), clear(16), dropped(0.15), pisa(0.09), sol(1.7),
    *(foveated(top=0, tile=4, radius=radius, levels=4) for radius in (2, 3, 6)),
    *(foveated(top=top, tile=4) for top in (0.02, 0.06, 0.098)), foveated(top=0.02, tile=4, radius=1, levels=3),
)  # fmt: skip
LARGE_CLIPS = (
    clear(4, temporal_radius=3), clear(8), dropped(0.1, 2, 5), pisa(0.04), pisa(0.09), sol(2.0),
    foveated(top=0.03, tile=2, frames=5), foveated(top=0.05, tile=2, frames=5), foveated(top=0.1, tile=2, frames=5),
    foveated(top=0.07, tile=2, frames=3), foveated(top=0.05, tile=2, frames=5, order=1),
    foveated(top=0.05, tile=4, frames=5, levels=2),
)  # fmt: skip
