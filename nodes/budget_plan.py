"""Budget Plan: chooses one of the distilled candidates for each site under a budget of FLOPs."""

import torch
from comfy_api.latest import io

from .. import patching
from ..attention.planning.budget import OPERATIONS, Budget, decide
from ..attention.planning.knapsack import METHODS
from ..attention.plans import read_expression
from ..attention.students.candidates import Candidates
from ..patching.calibrate import milliseconds
from . import node_status
from .sentences import answer
from .sockets import CATEGORY_PLAN, EXPERIMENTAL, AttentionPlan, AttentionStudent

COUNTS = ("operations", "milliseconds")


class LinearizeBudgetPlan(io.ComfyNode):
    """Trains nothing and changes no model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeBudgetPlan",
            display_name="Budget Plan",
            category=CATEGORY_PLAN,
            is_experimental=EXPERIMENTAL,
            description="Chooses for every site the candidate that it runs, or dense attention, so that the errors "
            "that were measured add up to the least that a budget of operations allows.",
            search_aliases=["block rate selection", "knapsack", "choose layers", "per layer attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model the student was distilled from; it tells sites and sizes."),
                AttentionStudent.Input("student", tooltip="From Distill Attention, best with several candidates."),
                io.Float.Input(
                    "budget",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of dense attention that may be left, at the size below, counted as count says.",
                ),
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
                    tooltip="Frames of the clip; picture models do not use it.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    optional=True,
                    advanced=True,
                    tooltip="optimal mixes all candidates. homogeneous takes one kind for the sites with the lowest "
                    "errors, as Attention Surgery's baseline does.",
                ),
                io.String.Input(
                    "keep_dense",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Sites that stay dense whatever the budget: double, single.0-3, or several with commas.",
                ),
                io.Float.Input(
                    "max_error",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    round=0.00001,
                    optional=True,
                    advanced=True,
                    tooltip="Candidates with a higher error are not used; a site without another one stays dense. 0 is "
                    "off.",
                ),
                io.Combo.Input(
                    "count",
                    options=list(COUNTS),
                    default=COUNTS[0],
                    optional=True,
                    advanced=True,
                    tooltip="What the budget counts: operations, or milliseconds that are measured here and now, on "
                    "made-up tokens of this size.",
                ),
            ],
            outputs=[
                AttentionStudent.Output(tooltip="The student with one candidate per site, for Apply, Save or "
                                        "Fine-tune."),
                AttentionPlan.Output(tooltip="What every site runs, without learned weights."),
                io.String.Output(display_name="text", tooltip="Kinds by number of sites, the share kept, errors."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, budget: float = 0.5, keep_dense: str = ""):
        """Return whether budget and sites can be meant, whatever the model."""
        return answer(check_budget, budget, keep_dense)

    @classmethod
    def execute(
        cls,
        model,
        student: Candidates,
        budget: float,
        width: int,
        height: int,
        frames: int,
        method: str = METHODS[0],
        keep_dense: str = "",
        max_error: float = 0.0,
        count: str = COUNTS[0],
    ) -> io.NodeOutput:
        """Return the decided student, its plan and a text."""
        host, module = patching.host_of(model)
        asked = Budget(budget, width, height, frames, method, keep_dense, max_error)
        counted = milliseconds(model) if count == COUNTS[1] else OPERATIONS
        with torch.inference_mode():
            found = decide(student, host, module, asked, counted)
        node_status.show_on_node(cls.hidden.unique_id)(found.text)
        return io.NodeOutput(found.student, found.plan, found.text)


def check_budget(budget: float, keep_dense: str) -> None:
    """Refuse what no student can meet.

    Raises:
        ValueError: `budget` is not above 0 and at most 1, or `keep_dense` cannot be read.
    """
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget is the share of dense attention's operations that may be left, above 0 and at most 1, got {budget}"
        )
    if keep_dense.strip():
        read_expression(keep_dense)
