"""Plot Site Errors: what distillation measured, site by site and candidate by candidate."""

import math

from comfy_api.latest import io, ui

from ..attention.hosts import HOSTS
from ..attention.shown import one_line
from ..attention.students.candidates import IN_MEMORY, Candidate, Candidates
from .error_picture import draw_errors
from .sockets import CATEGORY_INSPECT, EXPERIMENTAL, AttentionStudent


class LinearizeSiteErrors(io.ComfyNode):
    """Draws what the student holds; measures nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeSiteErrors",
            display_name="Plot Site Errors",
            category=CATEGORY_INSPECT,
            is_experimental=EXPERIMENTAL,
            description="Draws how far each site of a student is from the attention it replaces, one bar per "
            "candidate. Sites with long bars are those to keep dense.",
            search_aliases=["plot errors", "distillation error", "block error", "sensitivity"],
            is_output_node=True,
            inputs=[
                AttentionStudent.Input("student", tooltip="From Distill Attention or Budget Plan, or a loaded one."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="plot", tooltip="One group of bars per site, coloured by kind, on a log scale."
                ),
            ],
        )

    @classmethod
    def execute(cls, student: Candidates) -> io.NodeOutput:
        """Return the picture."""
        sites = measured_sites(student)
        title = next((host.title for host in HOSTS if host.name == student.host), one_line(student.host))
        picture = draw_errors(title, sites)
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture, cls=cls))


def measured_sites(student: Candidates) -> dict[str, tuple[Candidate, ...]]:
    """Return the candidates of each site, of a loaded student only those whose error its file holds.

    Raises:
        ValueError: there are none.
    """
    is_loaded = student.origin != IN_MEMORY
    sites = {site: of for site, of in student.sites.items() if not is_loaded or math.isfinite(of[0].error)}
    if not sites:
        raise ValueError("this student holds no errors to draw; Distill Attention measures them")
    return sites
