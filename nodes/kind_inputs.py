"""Inputs that several nodes share: the parameters of a kind, and where and when it runs."""

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from .. import patching
from ..attention.kinds.feature_maps import MAPS
from ..attention.planning.break_even import AUTO_TOKENS
from ..attention.plans import Plan, read_expression, select_sites
from ..attention.runtime.backends import AUTO, BACKENDS
from ..attention.runtime.runtime import SiteSettings
from ..attention.specs import (
    MOST_LEVELS,
    MOST_TILE,
    STABILIZERS,
    ChunkedSpec,
    ClearSpec,
    FoveatedSpec,
    HybridSpec,
    SiteSpec,
    Spec,
)
from . import node_status
from .sentences import answer

UNTRAINED_MAP = "elu1"  # has nothing to learn, and no map costs less


def feature_map_inputs() -> list[Any]:
    """Return the inputs that choose a feature map."""
    return [
        io.Combo.Input(
            "feature_map",
            options=list(MAPS),
            default=UNTRAINED_MAP,
            tooltip="What stands for the softmax of keys that are not exact. favor, elu1 and relu have nothing to "
            "learn and are rough; hedgehog, polynomial and linfusion give noise until they are trained.",
        ),
        io.Int.Input(
            "feature_dim",
            default=0,
            min=0,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="Features per head. 0 takes the map's own number; more cost more.",
        ),
    ]


def clear_inputs(*, advanced: bool = False) -> list[Any]:
    """Return the inputs of kind clear; `advanced` hides all but the radius behind a click."""
    default = ClearSpec()
    return [
        io.Int.Input(
            "radius",
            default=default.radius,
            min=1,
            max=1024,
            tooltip="Radius of the disc in tokens; one FLUX token is 16 pixels. Smaller is faster and keeps less.",
        ),
        io.Int.Input(
            "temporal_radius",
            default=default.temporal_radius,
            min=0,
            max=1024,
            optional=True,
            advanced=advanced,
            tooltip="Video only: radius in latent frames. 0 sees every frame.",
        ),
        io.Int.Input(
            "down_factor",
            default=default.down_factor,
            min=1,
            max=16,
            optional=True,
            advanced=advanced,
            tooltip="Also shows every token the average of each square of this many tokens a side. 1 is off. "
            "CLEAR's pooled weights use 4. Cost grows with the square of the pixels again.",
        ),
        io.Boolean.Input(
            "proportional",
            default=default.proportional,
            optional=True,
            advanced=advanced,
            tooltip="Sharpens attention for pictures above 1024 x 1024, as CLEAR's high-resolution recipe does.",
        ),
    ]


def foveated_inputs() -> list[Any]:
    """Return the inputs of kind foveated as a plan holds them."""
    default = FoveatedSpec()
    more: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        io.Float.Input(
            "top",
            default=default.top,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of the tiles that are exact for what they show; the others are averages. 0 goes by "
            "distance alone.",
        ),
        io.Int.Input(
            "radius",
            default=default.radius,
            min=0,
            max=1024,
            tooltip="Tokens nearer than this to a tile are always exact. 1 is the tile itself, 0 leaves it to content.",
            **more,
        ),
        io.Int.Input("tile", default=default.tile, min=1, max=MOST_TILE, tooltip="Side of a tile in tokens.", **more),
        io.Int.Input(
            "frames", default=default.frames, min=0, max=1024, tooltip="Latent frames of a tile. 0 is all.", **more
        ),
        io.Int.Input(
            "levels",
            default=default.levels,
            min=1,
            max=MOST_LEVELS,
            tooltip="Sizes of averages. Above 1 they begin at half a tile and double with the distance; tile is even "
            "then.",
            **more,
        ),
        io.Int.Input(
            "order",
            default=default.order,
            min=0,
            max=1,
            tooltip="1 adds what averages lose at first order, one matrix per head.",
            **more,
        ),
    ]


def hybrid_inputs() -> list[Any]:
    """Return the inputs of kind hybrid."""
    feature_map, feature_dim = feature_map_inputs()
    return [
        io.Int.Input(
            "rate",
            default=HybridSpec().rate,
            min=1,
            max=2**20,
            tooltip="Every rate-th token stays an exact key, the others are linear. 1 is dense attention.",
        ),
        feature_map,
        io.Combo.Input(
            "stabilizer",
            options=list(STABILIZERS),
            default=STABILIZERS[0],
            optional=True,
            advanced=True,
            tooltip="How linear keys of maps that learn are weighed against exact ones: max as in Attention Surgery, "
            "lse so that exact keys weigh 1 in all, common by one measure for both. Trained maps work with the one "
            "they were trained for; favor, elu1 and relu always weigh as in common.",
        ),
        feature_dim,
    ]


def chunked_inputs() -> list[Any]:
    """Return the inputs of kind chunked."""
    default = ChunkedSpec()
    return [
        io.Int.Input(
            "chunk_frames",
            default=default.chunk_frames,
            min=1,
            max=1024,
            tooltip="Latent frames per chunk; inside a chunk attention is exact.",
        ),
        io.Int.Input(
            "overlap_frames",
            default=default.overlap_frames,
            min=0,
            max=1024,
            tooltip="Latent frames before a chunk that it still sees exactly.",
        ),
        io.Boolean.Input("causal", default=default.causal, tooltip="Leaves out the frames that come after a chunk."),
        *feature_map_inputs(),
    ]


def place_inputs() -> list[Any]:
    """Return the advanced inputs that say where, when and how a kind runs."""
    percent = {"min": 0.0, "max": 1.0, "step": 0.01, "optional": True, "advanced": True}
    return [
        io.String.Input(
            "sites",
            default="all",
            optional=True,
            advanced=True,
            tooltip="Which self-attention sites: all, double, single, single.10-37, or several with commas.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            **percent,
            tooltip="Part of sampling at which the kind begins; before it attention is dense.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            **percent,
            tooltip="Part of sampling at which the kind ends; after it attention is dense.",
        ),
        io.Int.Input(
            "min_tokens",
            default=AUTO_TOKENS,
            min=AUTO_TOKENS,
            max=2**20,
            optional=True,
            advanced=True,
            tooltip="Calls with fewer tokens stay dense. -1 is automatic: dense where this kind was never faster on "
            "this machine, by what was measured here or else by a table. 0 runs the kind at every size. 4096 image "
            "tokens are 1024 x 1024 pixels of FLUX.",
        ),
        io.Combo.Input(
            "backend",
            options=[AUTO, *BACKENDS],
            default=AUTO,
            optional=True,
            advanced=True,
            tooltip="auto takes triton, the kernels for GPUs, or else torch, which runs everywhere. reference is "
            "float64 on every pair, for checking.",
        ),
    ]


class PlacedNode(io.ComfyNode):
    """A node with `place_inputs`."""

    @classmethod
    def validate_inputs(cls, sites: str = "all", start_percent: float = 0.0, end_percent: float = 1.0):
        """Return whether sites and percents can be meant, whatever the model."""
        return answer(check_place, sites, start_percent, end_percent)


def check_place(sites: str, start_percent: float, end_percent: float) -> None:
    """Refuse what `place_inputs` cannot mean, whatever the model.

    Raises:
        ValueError: `sites` cannot be read, a percent lies outside of 0 to 1, or the part of sampling is empty.
    """
    read_expression(sites)
    for name, value in (("start_percent", start_percent), ("end_percent", end_percent)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is from 0 to 1, got {value}")
    patching.part_of_sampling(start_percent, end_percent)


def untrained_notes(specs: Iterable[SiteSpec]) -> list[str]:
    """Return what a node says, beside that they are untrained, when specs run without a student."""
    names = {part.feature_map for spec in specs for part in spec.parts if part.has_maps}
    learned = sorted(name for name in names if any(True for _ in MAPS[name](1, 2).parameters()))
    return [f"feature map {', '.join(learned)} gives noise until it is trained; load a student"] if learned else []


def run_kind(
    model: Any,
    spec: Spec,
    node_id: str | None,
    *,
    sites: str = "all",
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    min_tokens: int = AUTO_TOKENS,
    backend: str = AUTO,
) -> tuple[Any, Plan]:
    """Return a clone of `model` that runs an untrained kind, and the plan of all its sites.

    Raises:
        ValueError: no host knows the model, `sites` names none, or the part of sampling is empty.
    """
    host, module = patching.host_of(model)
    part = patching.part_of_sampling(start_percent, end_percent)
    chosen = select_sites(sites, [site.id for site in host.sites(module)])
    settings = SiteSettings(spec, backend, part, min_tokens)
    notes = (*untrained_notes([spec]), *patching.replaced_notes(model, chosen))
    status = node_status.show_on_node(node_id, notes)
    patched, runtime = patching.patch_model(model, dict.fromkeys(chosen, settings), status)
    return patched, runtime.plan()
