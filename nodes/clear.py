"""CLEAR Attention: local windows on the self-attention of a loaded model."""

from comfy_api.latest import io

from ..attention.backends import BACKENDS
from ..attention.plans import Plan, group_sites, select_sites
from ..attention.runtime import SiteSettings
from ..attention.specs import ClearSpec
from . import model_files, patching
from .clear_source import AUTO, choices, clear_source, published_name
from .sockets import CATEGORY, AttentionPlan

DEFAULTS = ClearSpec()


class LinearizeCLEAR(io.ComfyNode):
    """Patches a clone of the model; what ran is shown on the node when sampling ends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeCLEAR",
            display_name="CLEAR Attention",
            category=CATEGORY,
            description="Lets each image token see only the tokens inside a disc around it, and all of the text. "
            "Time and memory of attention grow with the number of pixels instead of its square.",
            search_aliases=[
                "linear attention",
                "local attention",
                "window attention",
                "faster flux",
                "high resolution",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A loaded diffusion transformer. It is not changed; a patched copy comes out."
                ),
                io.Int.Input(
                    "radius",
                    default=DEFAULTS.radius,
                    min=1,
                    max=1024,
                    tooltip="Radius of the disc in tokens; one FLUX token is 16 pixels. Smaller is faster and keeps "
                    "less.",
                ),
                io.Combo.Input(
                    "weights",
                    options=choices(),
                    default=AUTO,
                    tooltip="Attention weights distilled for these windows. auto takes CLEAR's published file for "
                    "FLUX.1 where one fits and is there; choosing one that is not there downloads it (3.6 GB). none "
                    "uses the model's own weights, which were never trained for windows.",
                ),
                io.Int.Input(
                    "temporal_radius",
                    default=DEFAULTS.temporal_radius,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="Video only: radius in latent frames. 0 sees every frame.",
                ),
                io.Int.Input(
                    "down_factor",
                    default=DEFAULTS.down_factor,
                    min=1,
                    max=16,
                    advanced=True,
                    tooltip="Also shows every token the average of each square of this many tokens a side. 1 is off. "
                    "CLEAR's pooled weights use 4. Cost grows with the square of the pixels again.",
                ),
                io.Boolean.Input(
                    "proportional",
                    default=DEFAULTS.proportional,
                    advanced=True,
                    tooltip="Sharpens attention for pictures above 1024 x 1024, as CLEAR's high-resolution recipe "
                    "does.",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    advanced=True,
                    tooltip="Which self-attention sites: all, double, single, single.10-37, or several with commas.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Part of sampling at which windows begin; before it attention is dense.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Part of sampling at which windows end; after it attention is dense.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=0,
                    min=0,
                    max=2**20,
                    advanced=True,
                    tooltip="Calls with fewer tokens stay dense. 4096 image tokens are 1024 x 1024 pixels of FLUX.",
                ),
                io.Combo.Input(
                    "backend",
                    options=[AUTO, *BACKENDS],
                    default=AUTO,
                    advanced=True,
                    tooltip="auto takes triton, the kernels for GPUs, or else torch, which runs everywhere. reference "
                    "is float64 on every pair, for checking.",
                ),
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
        temporal_radius: int,
        down_factor: int,
        proportional: bool,
        sites: str,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        backend: str,
    ) -> io.NodeOutput:
        """Return the patched model and its plan."""
        host, module = patching.host_of(model)
        sigma_range = patching.sigma_range(model, start_percent, end_percent)
        chosen = select_sites(sites, [site.id for site in host.sites(module)])
        spec = ClearSpec(radius, temporal_radius, down_factor, proportional)
        source = clear_source(weights, spec, host, module)
        origin = model_files.identity(source.weights.file.path) if source.weights else ""
        settings = SiteSettings(source.spec, backend, sigma_range, min_tokens, bool(source.weights), origin)
        patched, runtime = patching.patch_model(
            model,
            dict.fromkeys(chosen, settings),
            patching.show_on_node(cls.hidden.unique_id, source.notes),
            projections=source.weights.projections(chosen) if source.weights else (),
            pools=source.weights.pool_weights(chosen) if source.weights else None,
        )
        plan = Plan(
            runtime.host.name, rules=group_sites({site: settings.spec for site, settings in runtime.sites.items()})
        )
        return io.NodeOutput(patched, plan)
