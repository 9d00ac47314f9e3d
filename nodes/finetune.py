"""Fine-tune Student: trains feature maps and changes of weights, block by block, then end to end."""

from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..attention.site_call import SiteCall
from ..attention.students.candidates import Candidates, decided
from ..patching.patcher import stop_if_interrupted, weights_without_backward
from ..training.comfyui.model import ComfyModel
from ..training.comfyui.trainee import ComfyTrainee
from ..training.engine.optimizers import OPTIMIZERS, check_optimizer
from ..training.engine.recipe import PRESETS, FinetuneRecipe
from ..training.finetune.estimate import Estimate, estimate
from ..training.finetune.finetune import Finetune
from ..training.jobs.watch import Update
from ..training.samples.folder import TeacherSamples as Samples
from .latent_pictures import as_preview, shower, side_by_side, vae_input
from .sentences import answer
from .sockets import CATEGORY_DISTILL, EXPERIMENTAL, AttentionStudent, TeacherSamples
from .training_run import NodeWatch, cancelled_runs, keep_unfinished_input
from .training_worker import check_count, gpus_input, train

TITLE = "fine-tuning"


class LinearizeFinetune(io.ComfyNode):
    """Stages 2 and 3 of distillation, on a copy of the model that is loaded for it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeFinetune",
            display_name="Fine-tune Student",
            category=CATEGORY_DISTILL,
            is_experimental=EXPERIMENTAL,
            description="Trains a student further with changes of the model's attention weights: each block alone, "
            "then the whole model, against what the teacher predicts. Needs the memory of training. Stopped, it goes "
            "on when it is run again.",
            search_aliases=["finetune", "distill weights", "train lora", "attention surgery", "clear", "微调", "训练"],
            inputs=[
                io.Model.Input("model", tooltip="The teacher: the model from before any Linearize node. It is not "
                               "changed; training loads a copy of it."),
                AttentionStudent.Input(
                    "student", tooltip="What Distill Attention or Load Linearized Attention gave. Of a site with "
                    "several candidates the one of lowest error is taken, unless Budget Plan chose before."
                ),
                TeacherSamples.Input("samples", tooltip="The teacher's samples, from Generate Teacher Samples."),
                io.Int.Input("updates", default=500, min=0, max=10**6,
                             tooltip="Updates of the whole model, after those of the single blocks."),
                io.Combo.Input(
                    "preset", options=list(PRESETS), default="ours",
                    tooltip="What the whole model learns from. ours: the teacher's prediction, and its attention at "
                    "every fourth site. clear: the samples, the prediction and the attention, as CLEAR does. "
                    "attention_surgery: the samples alone.",
                ),
                io.Int.Input("rank", default=64, min=0, max=4096,
                             tooltip="Rank of the changes of weights. 0 makes none: maps, pooling weights, biases "
                             "of averages and matrices learn alone."),
                *_advanced_inputs(),
            ],
            outputs=[
                AttentionStudent.Output(tooltip="The student, for Save or Apply Linearized Attention."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Loss by update, for the core's graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model,
        student: Candidates,
        samples: Samples,
        updates: int,
        preset: str,
        rank: int,
        full_rank: bool = False,
        preview_every: int = 0,
        gpus: int = 1,
        keep_unfinished: bool = False,
        vae: Any = None,
        **advanced: Any,
    ) -> io.NodeOutput:
        """Return the student and the losses."""
        subject = ComfyModel(model)
        notes = [subject.check(samples)]
        chosen, note = decided(student)
        kind = "maps" if rank == 0 else "full" if full_rank else "lora"
        recipe = FinetuneRecipe(updates=updates, trainables=kind, rank=max(rank, 1), **PRESETS[preset], **advanced)
        watch = FinetuneWatch(cls.hidden.unique_id, preview_every, keep_unfinished, vae)
        result = train(subject, samples, recipe, watch, gpus, student=chosen)
        watch.show("\n".join(filter(None, (result.text, note, *notes))))
        return io.NodeOutput(result.candidates, {"loss": result.history.get("loss", [])})

    @classmethod
    def validate_inputs(cls, updates: int = 500, block_updates: int = 200, optimizer: str = "adamw", gpus: int = 1):
        """Return whether there is something to do, the optimiser's package, and as many GPUs."""
        return answer(check_finetune, updates, block_updates, optimizer, gpus)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        """Return a value that changes when an unfinished student is handed on, so that the next run resumes."""
        return cancelled_runs()


def check_finetune(updates: int, block_updates: int, optimizer: str, gpus: int) -> None:
    """Refuse a run that would change nothing, lacks a package, or asks for more GPUs than there are.

    Raises:
        ValueError: see there.
    """
    if updates < 0 or block_updates < 0:
        raise ValueError("updates and block_updates are 0 or more")
    if updates == block_updates == 0:
        raise ValueError("with updates 0 and block_updates 0 nothing is trained; set one of them above 0")
    check_optimizer(optimizer)
    check_count(gpus)


class FinetuneWatch(NodeWatch):
    """Follows a run of fine-tuning: the text begins with the memory it takes, and the bar has pictures.

    Args:
        node_id: of the node.
        preview_every: updates between pictures; 0 makes none.
        keep_unfinished: as in `NodeWatch`.
        vae: decodes the pictures; None takes ComfyUI's previews.
    """

    def __init__(self, node_id: str | None, preview_every: int, keep_unfinished: bool = False, vae: Any = None) -> None:
        super().__init__(node_id, TITLE, keep_unfinished)
        self._preview_every, self._needed, self._vae = preview_every, "", vae
        self._preview: Callable[[], Any] | None = None

    def begin(self, stage: Finetune) -> None:
        trainee = stage.trainee
        assert isinstance(trainee, ComfyTrainee)
        needed = needed_memory(trainee, stage)
        free: Any = comfy.model_management.get_free_memory(trainee.device)
        # the model is there already
        self._needed = f"{TITLE} {needed.text(free + needed.base)}"
        self.show(self._needed)
        self._preview = previewer(trainee, stage, self._vae) if self._preview_every else None
        super().begin(stage)

    def say(self, text: str) -> None:
        """Show what is done between updates, above the memory that training needs; an interrupt ends it."""
        self.show("\n".join((f"{TITLE}: {text}", self._needed)))
        stop_if_interrupted()

    def picture(self, update: Update) -> Any:
        if self._preview is None or update.done % self._preview_every:
            return None
        return self._preview()


def needed_memory(trainee: ComfyTrainee, stage: Finetune) -> Estimate:
    """Return the device memory that a run needs, after one forward of the teacher, which shows its tokens."""
    seen: list[SiteCall] = []
    trainee.watch(stage.held_out[0], lambda call: None if seen else seen.append(call))
    (call,) = seen
    batch, heads, tokens, head_dim = call.query.shape
    weights, unpacked = list(trainee.module.parameters()), weights_without_backward(trainee.module).values()
    cast = [each for each in weights if each.dtype != call.query.dtype]
    return estimate(
        sum(each.nbytes for each in weights),
        sum(each.numel() for each in stage.trainables.trained().values()),
        optimizer=stage.recipe.optimizer,
        has_average=stage.recipe.ema > 0,
        num_tokens=batch * tokens,
        width=heads * head_dim,
        num_blocks=len(trainee.blocks),
        checkpointing=trainee.checkpointing,
        value_bytes=call.query.element_size(),
        num_cast=sum(each.numel() for each in (*cast, *unpacked)),
    )


def previewer(trainee: ComfyTrainee, stage: Finetune, vae: Any = None) -> Any:
    """Return a function that gives a picture of what the student sees in a held-out sample, or None for no pictures.

    With a VAE it stands beside what the student saw before this run.
    """
    show = shower(vae, trainee.device, trainee.latent_format)
    draw = stage.held_out[len(stage.held_out) // 2]
    if show is None:
        return None
    before = show(trainee.clean_picture(draw)) if vae is not None else None

    def picture() -> Any:
        now = show(trainee.clean_picture(draw))
        if now is None:
            return None
        return as_preview(side_by_side([before, now]) if before is not None else now)

    return picture


def _advanced_inputs() -> list[Any]:
    default = FinetuneRecipe()
    return [
        io.Int.Input(
            "block_updates", default=default.block_updates, min=0, max=10**6, optional=True, advanced=True,
            tooltip="Updates before those of the whole model, each block alone on the teacher's inputs. Cheap, and "
            "linear and hybrid attention gain most from it.",
        ),
        io.Boolean.Input(
            "full_rank", default=False, optional=True, advanced=True,
            tooltip="Changes whole weights instead of adding matrices of a rank, as CLEAR does. Wants a large GPU and "
            "a delta_rate of about 0.00001.",
        ),
        io.Float.Input(
            "map_rate", default=default.map_rate, min=1e-7, max=1.0, step=1e-5, round=1e-7, optional=True,
            advanced=True,
            tooltip="Learning rate of feature maps, pooling weights, biases of averages and matrices. Blocks alone "
            "take twice as much.",
        ),
        io.Float.Input(
            "delta_rate", default=default.delta_rate, min=1e-7, max=1.0, step=1e-5, round=1e-7, optional=True,
            advanced=True,
            tooltip="Learning rate of the changes of weights. Blocks alone take twice as much.",
        ),
        io.Combo.Input(
            "optimizer", options=list(OPTIMIZERS), default=default.optimizer, optional=True, advanced=True,
            tooltip="adamw needs nothing else. adamw_8bit (package bitsandbytes) takes less memory; prodigy "
            "(prodigyopt) finds its learning rates; schedule_free (schedulefree) averages by itself, with ema 0.",
        ),
        io.Float.Input(
            "ema", default=default.ema, min=0.0, max=0.9999, step=0.001, round=1e-4, optional=True, advanced=True,
            tooltip="Decay of the average over updates that is kept as the result. 0 keeps the last update.",
        ),
        io.Int.Input(
            "accumulation", default=default.accumulation, min=1, max=1024, optional=True, advanced=True,
            tooltip="Noised samples per update, one after the other. More are steadier and take longer.",
        ),
        io.Boolean.Input(
            "checkpointing", default=default.checkpointing, optional=True, advanced=True,
            tooltip="Keeps only what goes into each block and computes it again for the gradient: much less memory, "
            "about a third more time.",
        ),
        io.Int.Input(
            "warmup", default=default.warmup, min=0, max=10**6, optional=True, advanced=True,
            tooltip="Updates over which the learning rates rise, in each of the two stages.",
        ),
        io.Int.Input(
            "held_out", default=default.held_out, min=1, max=1024, optional=True, advanced=True,
            tooltip="Noised samples that are not trained on, by which the student is judged before and after.",
        ),
        io.Int.Input("seed", default=default.seed, min=0, max=2**31, optional=True, advanced=True,
                     tooltip="Of noise, noise levels and the first changes. Equal seeds train equally."),
        io.Int.Input(
            "preview_every", default=0, min=0, max=10**6, optional=True, advanced=True,
            tooltip="Updates between pictures of what the student sees in a noised sample. 0 shows none; pictures "
            "also need previews switched on in ComfyUI.",
        ),
        gpus_input(),
        keep_unfinished_input(),
        vae_input("the student before this run and now, every preview_every updates,"),
    ]  # fmt: skip
