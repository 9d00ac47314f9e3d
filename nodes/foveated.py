"""Foveated Attention: exact keys where it matters, means elsewhere; needs no trained weights."""

import comfy.model_management
from comfy_api.latest import io

from .. import patching
from ..attention.planning.keep import LEAST_KEEP, spec_of_keep
from ..attention.specs import MOST_LEVELS, MOST_TILE
from .kind_inputs import PlacedNode, place_inputs, run_kind
from .sockets import CATEGORY, EXPERIMENTAL, AttentionPlan


class LinearizeFoveated(PlacedNode):
    """Patches a clone of the model; what ran is shown on the node when sampling ends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeFoveated",
            display_name="Foveated Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Sees the image exactly where it matters and as averages elsewhere, so that attention costs a "
            "part of dense. Works without trained weights, on every supported model. Text stays exact.",
            search_aliases=[
                "sparse attention", "fast attention", "foveated", "speed up", "accelerate", "memory", "vram", "sage",
                "sage attention",
                "flux", "qwen", "wan", "video", "faster video", "no training", "加速", "稀疏", "省显存", "注视", "视频",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A loaded diffusion transformer. It is not changed; a patched copy "
                               "comes out."),
                io.Float.Input(
                    "keep", default=0.15, min=LEAST_KEEP, max=1.0, step=0.01,
                    tooltip="Share of the image that each token sees, exact tokens and averages together. Less is "
                    "faster and further from the model's own picture; 1 is dense.",
                ),
                io.Int.Input(
                    "radius", default=1, min=0, max=1024, optional=True, advanced=True,
                    tooltip="Tokens nearer than this to a tile are always exact. 1 is the tile itself, 0 leaves it to "
                    "content.",
                ),
                io.Float.Input(
                    "top", default=-1.0, min=-1.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Share of the tiles that are exact for what they show. -1 follows keep; 0 goes by "
                    "distance alone, with radius and levels.",
                ),
                io.Int.Input(
                    "tile", default=0, min=0, max=MOST_TILE, optional=True, advanced=True,
                    tooltip="Side of a tile in tokens. 0 takes 4 (clips 2), or twice that where keep is small and on a "
                    "GPU.",
                ),
                io.Int.Input(
                    "frames", default=0, min=0, max=1024, optional=True, advanced=True,
                    tooltip="Latent frames of a tile. 0 takes 5 for clips; more than there are means all.",
                ),
                io.Int.Input(
                    "levels", default=1, min=1, max=MOST_LEVELS, optional=True, advanced=True,
                    tooltip="Sizes of averages. Above 1 they begin at half a tile and double with the distance; tile "
                    "is even then.",
                ),
                *place_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model."),
                AttentionPlan.Output(tooltip="What every patched site runs."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, keep: float, radius: int = 1, top: float = -1.0, tile: int = 0, frames: int = 0, levels: int = 1,
        **place,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the patched model and its plan."""
        host, module = patching.host_of(model)
        on_gpu = comfy.model_management.get_torch_device().type != "cpu"
        spec = spec_of_keep(keep, host.makes_clips(module), radius, top, tile, frames, levels, on_gpu=on_gpu)
        return io.NodeOutput(*run_kind(model, spec, node_id=cls.hidden.unique_id, **place))
