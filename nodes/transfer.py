"""Distill Attention: candidates of every site learn from the teacher's own queries, keys and values."""

from typing import Any

from comfy_api.latest import io

from ..attention.plans import Plan
from ..training.comfyui.model import ComfyModel
from ..training.engine.recipe import VALUE_LOSSES, TransferRecipe
from ..training.samples.folder import TeacherSamples as Samples
from .sentences import answer
from .sockets import CATEGORY_DISTILL, EXPERIMENTAL, AttentionPlan, AttentionStudent, TeacherSamples
from .training_run import NodeWatch, cancelled_runs, keep_unfinished_input
from .training_worker import check_count, gpus_input, train

MAX_PLANS = 12
TITLE = "distilling attention"


class LinearizeTransfer(io.ComfyNode):
    """Stage 1 of distillation; the model itself is not trained, so any quantised or offloaded one will do."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        plans = io.Autogrow.TemplatePrefix(AttentionPlan.Input("plan"), prefix="plan", min=1, max=MAX_PLANS)
        return io.Schema(
            node_id="LinearizeTransfer",
            display_name="Distill Attention",
            category=CATEGORY_DISTILL,
            is_experimental=EXPERIMENTAL,
            description="Teaches feature maps, pooling weights and biases of averages the model's own attention, site "
            "by site. The model is not changed and needs no gradient. Stopped, it goes on when it is run again.",
            search_aliases=["distill attention", "attention transfer", "train linear attention", "蒸馏", "训练"],
            inputs=[
                io.Model.Input("model", tooltip="The teacher: the model from before any Linearize node."),
                TeacherSamples.Input("samples", tooltip="The teacher's samples, from Generate Teacher Samples."),
                io.Autogrow.Input(
                    "plans",
                    template=plans,
                    tooltip="What the sites are to run. Several plans give several candidates per site, trained from "
                    "the same passes of the teacher; Budget Plan then chooses.",
                ),
                io.Int.Input(
                    "updates",
                    default=1000,
                    min=0,
                    max=10**6,
                    tooltip="Updates of every candidate; each takes one pass of the teacher. 0 makes matrices only.",
                ),
                *_advanced_inputs(),
            ],
            outputs=[
                AttentionStudent.Output(tooltip="The candidates, for Budget Plan, Fine-tune Student or Save."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Loss by update, for the core's graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        samples: Samples,
        plans: dict[str, Plan],
        updates: int,
        gpus: int = 1,
        keep_unfinished: bool = False,
        **advanced: Any,
    ) -> io.NodeOutput:
        """Return the candidates and the losses."""
        subject = ComfyModel(model)
        note = subject.check(samples)
        host = subject.host
        given = tuple(plan.for_host(host.name, host.title) for plan in plans.values() if plan is not None)
        watch = NodeWatch(cls.hidden.unique_id, TITLE, keep_unfinished)
        result = train(subject, samples, TransferRecipe(updates=updates, **advanced), watch, gpus, plans=given)
        watch.show("\n".join(filter(None, (result.text, note))))
        return io.NodeOutput(result.candidates, {"loss": result.history.get("loss", [])})

    @classmethod
    def validate_inputs(cls, updates: int = 1000, output_draws: int = 32, gpus: int = 1, plans: dict | None = None):
        """Return whether there is something to learn, and as many GPUs. ComfyUI hands over `plans` unasked."""
        return answer(check_transfer, updates, output_draws, gpus)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        """Return a value that changes when an unfinished student is handed on, so that the next run resumes."""
        return cancelled_runs()


def check_transfer(updates: int, output_draws: int, gpus: int) -> None:
    """Refuse a run that would learn nothing, or asks for more GPUs than there are.

    Raises:
        ValueError: see there.
    """
    if updates < 0 or output_draws < 0:
        raise ValueError("updates and output_draws are 0 or more")
    if updates == output_draws == 0:
        raise ValueError("with updates 0 and output_draws 0 nothing is learned; set one of them above 0")
    check_count(gpus)


def _advanced_inputs() -> list[Any]:
    default = TransferRecipe()
    return [
        io.Float.Input(
            "learning_rate", default=default.learning_rate, min=1e-6, max=1.0, step=1e-4, optional=True, advanced=True,
            tooltip="Of AdamW, at its highest; it warms up and then falls along half a cosine.",
        ),
        io.Combo.Input(
            "loss", options=list(VALUE_LOSSES), default=default.loss, optional=True, advanced=True,
            tooltip="value compares attention outputs, as Attention Surgery does; squared weighs large differences "
            "more; score compares attention weights.",
        ),
        io.Int.Input(
            "queries", default=default.queries, min=0, max=2**20, optional=True, advanced=True,
            tooltip="Queries of each call that are trained on, drawn anew each time. 0 takes all; fewer need less "
            "memory. Keys are always all.",
        ),
        io.Int.Input(
            "replay", default=default.replay, min=1, max=1024, optional=True, advanced=True,
            tooltip="Passes of the teacher that are kept in host memory and trained on in turns. 1 keeps none.",
        ),
        io.Int.Input(
            "repeats", default=default.repeats, min=1, max=1024, optional=True, advanced=True,
            tooltip="Updates per pass of the teacher. More are cheaper and see less variety.",
        ),
        io.Int.Input(
            "held_out", default=default.held_out, min=1, max=1024, optional=True, advanced=True,
            tooltip="Passes on samples that are not trained on, by which candidates are judged.",
        ),
        io.Int.Input(
            "output_draws", default=default.output_draws, min=0, max=1024, optional=True, advanced=True,
            tooltip="Passes of which, in the end, a matrix per head behind each candidate's attention is made, in "
            "closed form. It is kept where it lowers the error; 0 makes none.",
        ),
        io.Int.Input("seed", default=default.seed, min=0, max=2**31, optional=True, advanced=True,
                     tooltip="Of noise, noise levels and queries. Equal seeds train equally."),
        gpus_input(),
        keep_unfinished_input(),
    ]  # fmt: skip
