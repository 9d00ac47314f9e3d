"""Attention Report: what attention costs at a size and, behind the sampler, what really ran."""

from comfy_api.latest import io, ui

from .. import patching
from ..attention.planning.report import describe_costs, site_costs
from . import node_status
from .plan_picture import draw_plan
from .sockets import CATEGORY_INSPECT


class LinearizeReport(io.ComfyNode):
    """Shows text and a map of the plan; changes nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeReport",
            display_name="Attention Report",
            category=CATEGORY_INSPECT,
            description="Says what the attention of a model costs at a size, site by site. Connect something that "
            "comes from the sampler to after, and it also says what really ran.",
            search_aliases=["attention cost", "flops", "profile attention"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The same model that goes into the sampler, patched or not."),
                io.Int.Input(
                    "width", default=1024, min=16, max=32768, step=8, tooltip="Width of the picture in pixels."
                ),
                io.Int.Input(
                    "height", default=1024, min=16, max=32768, step=8, tooltip="Height of the picture in pixels."
                ),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=8192,
                    optional=True,
                    advanced=True,
                    tooltip="Frames of the clip; picture models do not use it.",
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Anything that comes out of the sampler, such as its latent. The report then waits for it "
                    "and adds what ran in that sampling.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report."),
                io.Image.Output(
                    display_name="plan_map", tooltip="One row per site, coloured by kind, as long as its cost."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, width: int, height: int, frames: int = 1, after=None) -> io.NodeOutput:
        """Return the report as text and picture."""
        host, module = patching.host_of(model)
        runtime = patching.runtime_of(model)
        layout = host.planned_layout(module, width, height, frames, host.default_text_tokens)
        settings = runtime.sites if runtime else {}
        specs = {
            site: each.spec for site, each in settings.items() if each.trained or layout.num_tokens >= each.min_tokens
        }
        rows = site_costs(host, module, specs, layout, runtime.parameters.outputs() if runtime else ())
        size = f"{width} x {height}" + (f" x {frames}" if frames > 1 else "")
        text = describe_costs(host.title, size, layout, rows)
        if any(each.percents and not each.trained for each in settings.values()):
            text += "\nin the part of sampling from start_percent to end_percent; dense in the rest"
        if after is not None:
            text += "\n\nin the last sampling:\n" + (runtime.last_run() if runtime else "no Linearize node ran")
        node_status.show_on_node(cls.hidden.unique_id)(text)  # the interface shows ui.text of its own nodes only
        picture = draw_plan(f"{host.title}, {size}", rows)
        return io.NodeOutput(
            text, picture, ui={**ui.PreviewText(text).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        )
