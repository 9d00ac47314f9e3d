"""ComfyUI in this process with the pack's nodes as functions, and a teacher with its samples and pictures.

The nodes are the ones that a workflow has, so what is measured here is what a user gets. Their jobs are kept in
`.comfyui/evidence`: a stage that was done once is found again, and a stopped one goes on.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import ROOT, comfyui
from .clips import Clips
from .degrees import add_degrees
from .experiments import FLOW, NOISE_LEVELS, PRESETS, TRAININGS, Experiment, inputs_of
from .heads import plan_by_mass
from .lake import Lake

HOME = ROOT / ".comfyui" / "evidence"
TEACHERS = {"lake": Lake, "clips": Clips}
Question = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Any]
TEXT_TOKENS = 12  # of the demo's captions
TRAIN_SEED, TEST_SEED, NOISE_SEED, DRAWN_SEED = 10_000, 20_000, 1000, 30_000  # of captions, of test noise, of scenes


def boot(on_cpu: bool) -> Any:
    """Start ComfyUI in this process, with its output in HOME; return its module `nodes`."""
    HOME.mkdir(parents=True, exist_ok=True)
    nodes = comfyui.start(on_cpu)
    importlib.import_module("folder_paths").set_output_directory(str(HOME))
    return nodes


def unseen(scenes: Any, captions: list[str], count: int) -> Any:
    """Return the first scenes whose captions are not among some.

    Raises:
        ValueError: there are fewer than `count`.
    """
    places = [place for place, caption in enumerate(scenes.captions()) if caption not in set(captions)][:count]
    if len(places) < count:
        raise ValueError(f"only {len(places)} of the scenes have a caption that is not trained on, {count} are needed")
    choices, chances = ({name: values[places] for name, values in each.items()}
                        for each in (scenes.choices, scenes.chances))  # fmt: skip
    return type(scenes)(choices, chances)


class Laboratory:
    """A teacher and everything that makes students of it.

    Args:
        teacher: one of TEACHERS.
        device: "cpu" leaves accelerators alone; "cuda" takes one.
        scale: by which the updates of `SETTINGS` are multiplied.
    """

    def __init__(self, teacher: str = "lake", *, device: str, scale: float = 1.0) -> None:
        self.nodes, self.device, self.scale = boot(device == "cpu"), device, scale
        self.teacher = TEACHERS[teacher](self.nodes)
        with torch.inference_mode():
            self.model = self.nodes.UNETLoader().load_unet(self.teacher.file, "default")[0]
        self.prompts = self.teacher.draw(self.teacher.prompts, TRAIN_SEED).captions()
        self.test = unseen(self.teacher.draw(40 * self.teacher.tests, TEST_SEED), self.prompts, self.teacher.tests)
        add_degrees(self.module("attention.kinds.feature_maps"))
        presets = self.module(
            "training.engine.recipe"
        ).PRESETS  # the nodes offer them by name; these are for comparisons only
        presets[FLOW] = {**presets["clear"], "prediction": 0.0, "attention": 0.0}
        presets.update({
            f"{name}, {draws}": {**presets[name], "noise_levels": draws} for name in PRESETS for draws in NOISE_LEVELS
        })  # fmt: skip

    def module(self, name: str) -> Any:
        """Return a module of the pack as ComfyUI loaded it."""
        return comfyui.module(name)

    def node(self, node_id: str) -> Callable[..., tuple[Any, ...]]:
        """Return a node as a function of its inputs, defaults filled in, that returns its outputs."""
        cls = self.nodes.NODE_CLASS_MAPPINGS[node_id]
        defaults = {each.id: each.default for each in cls.define_schema().inputs
                    if getattr(each, "default", None) is not None}  # fmt: skip
        defaults |= {"min_tokens": 0} if "min_tokens" in defaults else {}  # the teachers are small
        prepared = cls.PREPARE_CLASS_CLONE(None)
        listed = bool(cls.define_schema().is_input_list)

        def call(**inputs: Any) -> tuple[Any, ...]:
            given = {**defaults, **inputs}
            if listed:
                given = {name: [value] for name, value in given.items()}
            with torch.inference_mode():
                return prepared.EXECUTE_NORMALIZED(**given).args

        return call

    @cache  # noqa: B019 - one laboratory lives as long as the process
    def samples(self, source: str) -> Any:
        """Return the samples to train on: the teacher's own, or scenes drawn for the same captions ("real")."""
        teacher = self.teacher
        guidance = {"guidance": teacher.guidance} if teacher.guidance else {}
        own = self.node("LinearizeTeacherSamples")(
            model=self.model, prompts="\n".join(self.prompts), name=teacher.name,
            clip=self.node("LinearizeDemoTextEncoder")()[0], latent_image=teacher.empty(teacher.size, 1),
            steps=teacher.steps, cfg=teacher.cfg, **guidance,
        )[0]  # fmt: skip
        return own if source == "teacher" else self._drawn(own)

    def student(self, experiment: Experiment) -> Any:
        """Return what goes into Apply Linearized Attention: a plan, or a student trained now or found done.

        Raises:
            ValueError: the nodes refuse it, or another process works on one of its jobs.
        """
        specs = [self.module("attention.spec_json").spec_from_json(spec) for spec in experiment.method.specs]
        if experiment.method.planner == "heads":
            plans = [plan_by_mass(self, specs[0].radius)]
        else:
            plans = [self.module("attention.plans").Plan(self.teacher.host, spec) for spec in specs]
        if experiment.training == "untrained" and not experiment.method.budget:
            return plans[0]
        transfer, finetune = inputs_of(experiment, self.scale)
        samples = self.samples(experiment.samples)
        named = {f"plan{number}": plan for number, plan in enumerate(plans)}
        found = self.node("LinearizeTransfer")(model=self.model, samples=samples, plans=named, **transfer)[0]
        found = found.chosen(self._choice(found, experiment))
        if any(TRAININGS[experiment.training][2:]):
            found = self.node("LinearizeFinetune")(model=self.model, samples=samples, student=found, **finetune)[0]
        return found

    def _choice(self, candidates: Any, experiment: Experiment) -> dict[str, int]:
        """Return the number of the candidate that each site runs; those that stay dense are left out."""
        method = experiment.method
        if not method.budget:
            return dict.fromkeys(candidates.sites, 0)
        host, module = self.module("patching").host_of(self.model)
        layout = self._layout(host, module, experiment.tokens)
        options = self.module("attention.planning.budget").site_options(candidates, host, module, layout)
        return (
            self.module("attention.planning.knapsack")
            .plan_under_budget(options, method.budget, method.planner)[0]
            .choice
        )

    def _layout(self, host: Any, module: Any, tokens: int) -> Any:
        """Return the tokens of a forward, with as many of text as the demo's captions have."""
        return host.planned_layout(module, *self.teacher.dimensions(tokens), TEXT_TOKENS)

    def apply(self, attention: Any) -> Any:
        """Return the model with a plan or a student on it."""
        return self.node("LinearizeApply")(model=self.model, attention=attention)[0]

    def flops_kept(self, attention: Any, tokens: int) -> float:
        """Return the attention FLOPs of a plan or a student at a size over those of dense attention."""
        model = self.apply(attention)
        patching, report = self.module("patching"), self.module("attention.planning.report")
        (host, module), runtime = patching.host_of(model), patching.runtime_of(model)
        layout = self._layout(host, module, tokens)
        specs = {site: each.spec for site, each in runtime.sites.items()}
        rows = report.site_costs(host, module, specs, layout, runtime.parameters.outputs())
        return sum(row.planned.flops for row in rows) / sum(row.dense.flops for row in rows)

    def ask(self, model: Any, positive: Any, noise: Tensor, latent: Tensor, question: Question) -> Any:
        """Let a function call a model where a sampler would, and return what it returns.

        Args:
            model: a model patcher.
            positive: a caption as KSampler takes it; there is no guidance.
            noise, latent: (1, 16, ...), the latent as ComfyUI's nodes pass it on.
            question: called with the model as a function of latents and noise levels (1,), the noise and the latent, in
                the model's units and on its device.
        """
        samplers, sample = (importlib.import_module(name) for name in ("comfy.samplers", "comfy.sample"))
        answers: list[Any] = []

        class Questioner(samplers.Sampler):
            """Asks instead of sampling."""

            def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
                       disable_pbar=False):  # fmt: skip
                answers.append(question(partial(model_wrap, **extra_args), noise, latent_image))
                return latent_image

        levels = torch.tensor([1.0, 0.0])
        with torch.inference_mode():
            sample.sample_custom(model, noise, 1.0, Questioner(), levels, positive, positive, latent, disable_pbar=True)
        return answers[0]

    def conditionings(self, captions: list[str] | None = None) -> list[Any]:
        """Return captions, by default the test's, as KSampler takes them."""
        guidance = {"guidance": self.teacher.guidance} if self.teacher.guidance else {}
        captions = self.test.captions() if captions is None else captions
        return [[[text, {**more, **guidance}] for text, more in self._encoded(caption)]
                for caption in captions]  # fmt: skip

    def latents(
        self, model: Any, tokens: int, captions: list[str] | None = None, noise_seed: int = NOISE_SEED
    ) -> Tensor:
        """Return latents (B, 16, ...) that a model samples for captions, by default the test's, each from its noise."""
        found, negative = [], self._encoded("")
        for number, positive in enumerate(self.conditionings(captions)):
            with torch.inference_mode():
                found.append(self.nodes.KSampler().sample(
                    model, noise_seed + number, self.teacher.test_steps, self.teacher.cfg, "euler", "simple", positive,
                    negative, self.teacher.empty(tokens, 1),
                )[0]["samples"])  # fmt: skip
        return torch.cat(found)

    def _encoded(self, caption: str) -> Any:
        return self.node("LinearizeDemoCaption")(caption=caption)[0]

    def _drawn(self, own: Any) -> Any:
        """Return a copy of samples with drawn scenes of the same captions in place of the teacher's pictures."""
        writer_of, samples_of = self.module("training.samples.writer"), self.module("training.samples.folder")
        captions = [entry.prompt for entry in own.entries]
        drawn = self.model.model.process_latent_out(self.teacher.drawn_latents(captions, DRAWN_SEED))
        folder = HOME / "linearize" / f"{self.teacher.name}_real"
        with writer_of.SamplesWriter(folder, own.about) as writer:
            requests = [writer_of.Request(number, caption) for number, caption in enumerate(captions)]
            for each in writer.missing(requests):
                positive = writer.put(own.conditioning(each.number))
                writer.add(each.number, each.prompt, drawn[each.number : each.number + 1], positive, None)
        return samples_of.TeacherSamples.open(folder)
