"""Linear Attention and Hybrid Attention: attention through feature maps, alone or beside exact keys."""

from comfy_api.latest import io

from ..attention.specs import STABILIZERS, HybridSpec, LinearSpec
from .kind_inputs import PlacedNode, feature_map_inputs, hybrid_inputs, place_inputs, run_kind
from .sockets import CATEGORY, EXPERIMENTAL, AttentionPlan

MODEL_TOOLTIP = "A loaded diffusion transformer. It is not changed; a patched copy comes out."


def _outputs() -> list:
    return [
        io.Model.Output(tooltip="The patched model."),
        AttentionPlan.Output(tooltip="What every patched site runs."),
    ]


class LinearizeLinear(PlacedNode):
    """Patches a clone of the model; what ran is shown on the node when sampling ends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeLinear",
            display_name="Linear Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Replaces softmax attention by linear attention, whose cost grows with the number of tokens. "
            "Text stays exact. Without a trained student the picture falls apart on most sites.",
            search_aliases=["linear attention", "performer", "hedgehog", "feature map", "线性"],
            inputs=[io.Model.Input("model", tooltip=MODEL_TOOLTIP), *feature_map_inputs(), *place_inputs()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, feature_map: str, feature_dim: int = 0, **place) -> io.NodeOutput:
        """Return the patched model and its plan."""
        spec = LinearSpec(feature_map, feature_dim)
        return io.NodeOutput(*run_kind(model, spec, node_id=cls.hidden.unique_id, **place))


class LinearizeHybrid(PlacedNode):
    """Patches a clone of the model; what ran is shown on the node when sampling ends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeHybrid",
            display_name="Hybrid Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Attention Surgery's hybrid: every rate-th token stays an exact key, the others go through a "
            "feature map. For video models above all. Wants a trained student to look right.",
            search_aliases=[
                "attention surgery",
                "hybrid attention",
                "linear attention",
                "wan",
                "video",
                "faster video",
                "混合",
                "视频",
            ],
            inputs=[io.Model.Input("model", tooltip=MODEL_TOOLTIP), *hybrid_inputs(), *place_inputs()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        rate: int,
        feature_map: str,
        stabilizer: str = STABILIZERS[0],
        feature_dim: int = 0,
        **place,
    ) -> io.NodeOutput:
        """Return the patched model and its plan."""
        spec = HybridSpec(rate, feature_map, feature_dim, stabilizer)
        return io.NodeOutput(*run_kind(model, spec, node_id=cls.hidden.unique_id, **place))
