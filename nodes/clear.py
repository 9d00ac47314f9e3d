"""CLEAR Attention: local windows on the self-attention of a loaded model."""

from functools import partial

from comfy_api.latest import io

from .. import patching
from ..attention.planning.break_even import AUTO_TOKENS
from ..attention.plans import select_sites
from ..attention.runtime import backends
from ..attention.runtime.runtime import SiteSettings
from ..attention.specs import ClearSpec
from ..patching.patcher import parameter
from . import model_files, node_status
from .clear_source import AUTO, choices, clear_source, published_name, read_weights
from .kind_inputs import PlacedNode, clear_inputs, place_inputs
from .model_takers import NOT_SAMPLED, taker_notes
from .sockets import CATEGORY, EXPERIMENTAL, AttentionPlan

WINDOWS = ClearSpec()


class LinearizeCLEAR(PlacedNode):
    """Patches a clone of the model; what ran is shown on the node when sampling ends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        radius, *windows = clear_inputs(advanced=True)
        return io.Schema(
            node_id="LinearizeCLEAR",
            display_name="CLEAR Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Lets each image token see only the tokens inside a disc around it, and all of the text. "
            "Time and memory of attention grow with the number of pixels instead of its square.",
            search_aliases=[
                "linear attention",
                "local attention",
                "window attention",
                "sparse attention",
                "faster flux",
                "speed up",
                "accelerate",
                "memory",
                "sage",
                "sage attention",
                "high resolution",
                "加速",
                "窗口",
                "稀疏",
                "高分辨率",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A loaded diffusion transformer. It is not changed; a patched copy comes out."
                ),
                radius,
                io.Combo.Input(
                    "weights",
                    options=choices(),
                    default=AUTO,
                    tooltip="Attention weights distilled for these windows. auto takes CLEAR's published file "
                    "where it is there and this model is FLUX.1-dev or close to it by its weights; choosing a file "
                    "uses it on any model that it fits, and downloads it if it is not there (3.6 GB). none uses the "
                    "model's own weights, which were never trained for windows.",
                ),
                *windows,
                *place_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model."),
                AttentionPlan.Output(tooltip="What every patched site runs."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str = AUTO, radius: int = 0, down_factor: int = 1, **_):
        """Return what changes when the file that is chosen, or that auto would take, comes or changes."""
        return weights, model_files.state(published_name(radius, down_factor) if weights == AUTO else weights)

    @classmethod
    def execute(
        cls,
        model,
        radius: int,
        weights: str,
        temporal_radius: int = WINDOWS.temporal_radius,
        down_factor: int = WINDOWS.down_factor,
        proportional: bool = WINDOWS.proportional,
        sites: str = "all",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        min_tokens: int = AUTO_TOKENS,
        backend: str = backends.AUTO,
    ) -> io.NodeOutput:
        """Return the patched model and its plan."""
        host, module = patching.host_of(model)
        part = patching.part_of_sampling(start_percent, end_percent)
        chosen = select_sites(sites, [site.id for site in host.sites(module)])
        spec = ClearSpec(radius, temporal_radius, down_factor, proportional)
        source = clear_source(weights, spec, host, module, partial(parameter, model))
        weights_read, origin = read_weights(source.weights, chosen)
        settings = SiteSettings(source.spec, backend, part, min_tokens, bool(source.weights), origin)
        takers = taker_notes(cls.hidden.unique_id) if source.weights else ()
        notes = (*source.notes, *patching.replaced_notes(model, chosen), *takers)
        status = node_status.show_on_node(cls.hidden.unique_id, notes)
        if takers:  # the model that they take may never be sampled
            status(NOT_SAMPLED)
        patched, runtime = patching.patch_model(
            model,
            dict.fromkeys(chosen, settings),
            status,
            **weights_read,
        )
        return io.NodeOutput(patched, runtime.plan())
