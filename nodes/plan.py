"""Uniform Plan, which makes a plan, and Apply Linearized Attention, which puts one on a model."""

from dataclasses import replace

from comfy_api.latest import io

from ..attention.hosts import HOSTS
from ..attention.plans import ANY_HOST, Plan, read_expression
from ..attention.spec_json import spec_from_json
from ..attention.specs import SPECS
from ..attention.students.candidates import Candidates
from .apply import apply_plan, apply_student
from .kind_inputs import chunked_inputs, clear_inputs, feature_map_inputs, foveated_inputs, hybrid_inputs
from .sentences import answer
from .sockets import CATEGORY, CATEGORY_PLAN, EXPERIMENTAL, AttentionPlan, AttentionStudent


class LinearizeUniformPlan(io.ComfyNode):
    """One spec for some or all sites, alone or on top of another plan."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeUniformPlan",
            display_name="Uniform Plan",
            category=CATEGORY_PLAN,
            is_experimental=EXPERIMENTAL,
            description="Writes a plan: one kind of attention for the sites you name. Chain several to mix kinds; "
            "where two name the same site, the later one holds.",
            search_aliases=["attention plan", "per layer attention"],
            inputs=[
                io.DynamicCombo.Input(
                    "kind",
                    options=[
                        io.DynamicCombo.Option("clear", clear_inputs()),
                        io.DynamicCombo.Option("dense", []),
                        io.DynamicCombo.Option("foveated", foveated_inputs()),
                        io.DynamicCombo.Option("hybrid", hybrid_inputs()),
                        io.DynamicCombo.Option("linear", feature_map_inputs()),
                        io.DynamicCombo.Option("chunked", chunked_inputs()),
                    ],
                    tooltip="clear sees a disc around each token. dense leaves the sites as they are. foveated sees "
                    "exactly what content asks for and averages elsewhere. hybrid keeps every rate-th key exact, "
                    "linear none; chunked keeps those of some frames.",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    tooltip="Which self-attention sites: all, double, single, single.10-37, or several with commas.",
                ),
                io.Combo.Input(
                    "host",
                    options=[ANY_HOST, *(host.name for host in HOSTS)],
                    default=ANY_HOST,
                    tooltip="Architecture the plan is for. auto is that of the model which the plan meets. A plan that "
                    "comes in decides instead.",
                ),
                AttentionPlan.Input("plan", optional=True, tooltip="A plan that this one goes on top of."),
            ],
            outputs=[AttentionPlan.Output(tooltip="The plan; Apply Linearized Attention runs it.")],
        )

    @classmethod
    def validate_inputs(cls, sites: str = "all", kind: dict | None = None):
        """Return whether the expression can be read. ComfyUI hands over `kind` whether it is asked for or not."""
        return answer(read_expression, sites)

    @classmethod
    def execute(
        cls, kind: dict | None = None, sites: str = "all", host: str = ANY_HOST, plan: Plan | None = None
    ) -> io.NodeOutput:
        """Return the plan."""
        if not kind:  # of a choice that there is not, ComfyUI hands nothing over
            raise ValueError(f"kind is one of {', '.join(sorted(SPECS))}")
        base = plan or Plan(host)
        base = base if base.host != ANY_HOST else replace(base, host=host)
        kind = {name: value for name, value in kind.items() if value is not None}  # left out, ComfyUI gives it so
        return io.NodeOutput(Plan(base.host, base.default, (*base.rules, (sites, spec_from_json(kind)))))


class LinearizeApply(io.ComfyNode):
    """Puts a plan or a student on a clone of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeApply",
            display_name="Apply Linearized Attention",
            category=CATEGORY,
            is_experimental=EXPERIMENTAL,
            description="Runs a plan or a student on a model. What ran is shown on the node when sampling ends.",
            inputs=[
                io.Model.Input("model", tooltip="A loaded diffusion transformer. It is not changed; a copy comes out."),
                io.MultiType.Input(
                    "attention",
                    types=[AttentionPlan, AttentionStudent],
                    tooltip="A plan, or a student with its learned weights.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, attention: Plan | Candidates) -> io.NodeOutput:
        """Return the patched model."""
        if isinstance(attention, Plan):
            return io.NodeOutput(apply_plan(model, attention, cls.hidden.unique_id))
        return io.NodeOutput(apply_student(model, attention, cls.hidden.unique_id))
