"""Attention Report: what attention costs at a size and, behind the sampler, what really ran."""

from collections.abc import Mapping
from typing import Any

import comfy.model_management
from comfy_api.latest import io, ui

from .. import patching
from ..attention.calibration.describe import describe_measured
from ..attention.hosts import Host
from ..attention.planning.break_even import AUTO_TOKENS, least_tokens
from ..attention.planning.report import describe_costs, describe_sampled, site_costs
from ..attention.runtime.runtime import Runtime, SiteSettings
from . import node_status
from .plan_picture import draw_plan
from .sockets import CATEGORY_INSPECT, EXPERIMENTAL


class LinearizeReport(io.ComfyNode):
    """Shows text and a map of the plan; changes nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeReport",
            display_name="Attention Report",
            category=CATEGORY_INSPECT,
            is_experimental=EXPERIMENTAL,
            description="Says what the attention of a model costs at a size, site by site. Connect something that "
            "comes from the sampler to after, and it also says what really ran.",
            search_aliases=["attention cost", "flops", "profile attention", "memory", "seconds", "报告"],
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
        device = comfy.model_management.get_torch_device().type
        known = runtime.last_record()[0].break_even if runtime else {}
        specs = {site: each.spec for site, each in settings.items() if runs_at(each, layout.num_tokens, device, known)}
        rows = site_costs(host, module, specs, layout, runtime.parameters.outputs() if runtime else ())
        size = f"{width} x {height}" + (f" x {frames}" if frames > 1 else "")
        text = describe_costs(host.title, size, layout, rows)
        if any(each.percents and not each.trained for each in settings.values()):
            text += "\nin the part of sampling from start_percent to end_percent; dense in the rest"
        kept = {each.spec.kind for site, each in settings.items() if site not in specs and not each.spec.is_dense}
        if kept:
            text += f"\n{', '.join(sorted(kept))} stays dense at this size, by min_tokens"
        measured = {site: each.measured for site, each in settings.items() if each.measured is not None}
        text = "\n".join([text, *describe_measured(list(measured.values()))])
        if after is not None:
            text = f"{what_ran(host, module, runtime)}\n\nplanned:\n{text}"
        node_status.show_on_node(cls.hidden.unique_id)(text)
        picture = draw_plan(f"{host.title}, {size}", rows, measured)
        return io.NodeOutput(
            text, picture, ui={**ui.PreviewText(text).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        )


def runs_at(settings: SiteSettings, tokens: int, device: str, known: Mapping[str, int]) -> bool:
    """Return whether a site's spec runs on calls of so many tokens.

    Args:
        known: by kind, from how many tokens on it pays, where a run found out; else the table says it.
    """
    if settings.trained:
        return True
    kind, is_auto = settings.spec.kind, settings.min_tokens == AUTO_TOKENS
    return tokens >= ((known.get(kind) or least_tokens(device, kind)) if is_auto else settings.min_tokens)


def what_ran(host: Host, module: Any, runtime: Runtime | None) -> str:
    """Return what the last sampling did, its outcome first and then what it was given."""
    if runtime is None:
        return "no Linearize node ran"
    outcome, *details = runtime.last_run().split("\n")
    layouts = runtime.last_record()[0].layouts
    given = [f"sampled: {describe_sampled(host, module, layouts)}"] if layouts else []
    return "\n".join([outcome, *given, *details])
