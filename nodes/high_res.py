"""High-Resolution FLUX: CLEAR's recipe for a second pass over an enlarged picture."""

from comfy_api.latest import io

from .. import patching
from ..attention.planning.high_res import HighResRecipe, describe_recipe, high_res_sigmas, size_note
from ..attention.planning.report import describe_costs, site_costs
from . import node_status
from .sockets import CATEGORY, EXPERIMENTAL

DEFAULTS = HighResRecipe()
HOST = "flux"


class LinearizeHighRes(io.ComfyNode):
    """Patches a clone of the model and gives the noise levels to sample with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeHighRes",
            display_name="High-Resolution FLUX",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Prepares FLUX to repaint an enlarged picture at 2048 x 2048 and more, as CLEAR's authors do: "
            "positions stretched, attention sharpened for the larger size, sampling from partial noise.",
            search_aliases=["upscale", "4k", "ntk rope", "img2img sigmas", "hires fix"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1, best behind CLEAR Attention. It is not changed."),
                io.Int.Input(
                    "width",
                    default=2048,
                    min=16,
                    max=32768,
                    step=16,
                    tooltip="Width of the enlarged picture in pixels. The node shows what its attention costs.",
                ),
                io.Int.Input(
                    "height",
                    default=2048,
                    min=16,
                    max=32768,
                    step=16,
                    tooltip="Height of the enlarged picture in pixels. The node shows what its attention costs.",
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULTS.strength,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Part of the steps that run. More adds detail and keeps less of the picture that goes in.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="Steps of a whole sampling; the last strength of them run. 20 at strength 0.7 runs 14.",
                ),
                io.Float.Input(
                    "shift",
                    default=DEFAULTS.shift,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Moves the noise levels up. More starts with more noise; 1 spaces them evenly.",
                ),
                io.Float.Input(
                    "ntk_factor",
                    default=DEFAULTS.ntk_factor,
                    min=1.0,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Multiplies the base of FLUX's rotary positions, which stretches them. 1 leaves them.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model."),
                io.Sigmas.Output(tooltip="Noise levels for SamplerCustomAdvanced, whose noise stays on."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        width: int,
        height: int,
        strength: float = DEFAULTS.strength,
        steps: int = DEFAULTS.steps,
        shift: float = DEFAULTS.shift,
        ntk_factor: float = DEFAULTS.ntk_factor,
    ) -> io.NodeOutput:
        """Return the patched model and the noise levels."""
        host, module = patching.host_of(model)
        if host.name != HOST:
            raise ValueError(f"this recipe is for FLUX.1, the model is {host.title}; leave High-Resolution FLUX out")
        recipe = HighResRecipe(strength, steps, shift, ntk_factor)
        sigmas = high_res_sigmas(steps, strength, shift)
        patched = patching.set_proportional_scale(patching.set_rope_base(model, ntk_factor))
        runtime = patching.runtime_of(patched)
        specs = {site: settings.spec for site, settings in runtime.sites.items()} if runtime else {}
        layout = host.planned_layout(module, width, height, 1, host.default_text_tokens)
        matrices = runtime.parameters.outputs() if runtime else ()
        rows = site_costs(host, module, specs, layout, matrices)
        costs = describe_costs(host.title, f"{width} x {height}", layout, rows)
        lines = describe_recipe(recipe, sigmas.tolist(), patching.rope_base_of(patched), specs, layout.num_tokens)
        text = "\n".join(filter(None, [costs, *lines, size_note(width, height)]))
        node_status.show_on_node(cls.hidden.unique_id)(text)
        return io.NodeOutput(patched, sigmas)
