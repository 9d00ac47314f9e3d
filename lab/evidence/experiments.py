"""What is tried: methods, how much of the training each gets, seeds. A row of results.csv is one `Experiment`.

Two experiments that share their first stages share that work: each stage is a job on disk, found again by its recipe.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from .degrees import DEGREES, name_of

SEEDS = (0, 1, 2)
FLOW = "flow alone"  # a preset that only the evidence has: CLEAR's without its distillation losses
NOISE_LEVELS = ("middle", "even", "unshifted")  # how they are drawn end to end, see `FinetuneRecipe`
PRESETS = ("ours", "clear", FLOW, "attention_surgery")  # that are also there with other noise levels
UNTRAINED, STAGE0, STAGE1, STAGE2, ALL = "untrained", "stage 0", "stage 1", "stages 1, 2", "all stages"
TRAININGS = {  # which stages run: matrices, maps, block by block, end to end
    UNTRAINED: (False, False, False, False),
    STAGE0: (True, False, False, False),
    STAGE1: (True, True, False, False),
    STAGE2: (True, True, True, False),
    ALL: (True, True, True, True),
}


@dataclass(frozen=True)
class Method:
    """What the sites run.

    Args:
        name: for people and for results.csv.
        specs: the kinds with their settings, as JSON holds a spec; several are candidates of a budget.
        budget: share of the dense attention's FLOPs that Budget Plan may keep; 0 plans nothing.
        planner: of Budget Plan, where there is a budget; "heads" chooses a radius per head at the cost of the spec's.
    """

    name: str
    specs: tuple[dict[str, Any], ...]
    budget: float = 0.0
    planner: str = "optimal"

    @property
    def has_maps(self) -> bool:
        """Whether stage 1 has something to learn."""
        return any(spec.get("feature_map") in LEARNED or spec.get("down_factor", 1) > 1 for spec in self.specs)


@dataclass(frozen=True)
class Experiment:
    """One student and everything that made it.

    Args:
        suite: the question that it helps to answer.
        method, training, seed: see above; the seed is of the training alone.
        transfer, finetune: inputs of the nodes that differ from `SETTINGS`.
        samples: "teacher" for its own samples, "real" for drawn scenes.
        tokens: size at which the student is measured, in tokens a side (of clips, in columns); it is always trained
            at the teacher's training size.
        note: what tells it from others of its suite with the same method and training.
        factor: on the updates of `SETTINGS`.
    """

    suite: str
    method: Method
    training: str = ALL
    seed: int = 0
    transfer: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    samples: str = "teacher"
    tokens: int = 32
    note: str = ""
    factor: float = 1.0

    @property
    def key(self) -> tuple[str, ...]:
        """What makes rows comparable."""
        return self.suite, self.method.name, self.training, str(self.seed), self.note, str(self.tokens)


LEARNED = ("hedgehog", "polynomial", "linfusion", *map(name_of, DEGREES))


def clear(radius: int, down_factor: int = 1) -> Method:
    """Return CLEAR's windows, with pooled far keys where `down_factor` is above 1."""
    more = f" pooled {down_factor}" if down_factor > 1 else ""
    return Method(f"clear r={radius}{more}", ({"kind": "clear", "radius": radius, "down_factor": down_factor},))


def linear(feature_map: str) -> Method:
    """Return linear attention."""
    return Method(f"linear {feature_map}", ({"kind": "linear", "feature_map": feature_map},))


def chunked(frames: int, overlap: int, causal: bool = False) -> Method:
    """Return ReHyAt's chunks of frames."""
    spec = {"kind": "chunked", "chunk_frames": frames, "overlap_frames": overlap, "causal": causal,
            "feature_map": "polynomial"}  # fmt: skip
    return Method(f"chunked {frames} overlap {overlap}{' causal' if causal else ''}", (spec,))


def hybrid(rate: int, feature_map: str = "polynomial", stabilizer: str = "max") -> Method:
    """Return hybrid attention."""
    spec = {"kind": "hybrid", "rate": rate, "feature_map": feature_map, "stabilizer": stabilizer}
    return Method(f"hybrid R={rate} {feature_map} {stabilizer}", (spec,))


PER_HEAD = Method("clear r=4 per head", clear(4).specs, planner="heads")
METHODS = (
    clear(2), clear(4), clear(6), clear(12), clear(4, down_factor=2), PER_HEAD,
    linear("elu1"), linear("relu"), linear("favor"), linear("hedgehog"), linear("linfusion"), linear("polynomial"),
    hybrid(2), hybrid(4), hybrid(8), hybrid(4, stabilizer="lse"), hybrid(4, "hedgehog"),
)  # fmt: skip
STAGED = (clear(4), linear("polynomial"), hybrid(4))
CANDIDATES = clear(2).specs + clear(4).specs + clear(8).specs + clear(12).specs + linear("hedgehog").specs
BUDGETS = (0.05, 0.1, 0.2)  # of dense attention; all candidates are cheaper than dense attention at this size


def methods() -> list[Experiment]:
    """Every method after every stage; block by block alone for a method of each kind."""
    found = []
    for method in METHODS:
        trainings = [UNTRAINED, STAGE0] + [STAGE1] * method.has_maps + [STAGE2] * (method in STAGED) + [ALL]
        for training in trainings:
            seeds = SEEDS if training in (STAGE1, ALL) else SEEDS[:1]
            found += [Experiment("methods", method, training, seed) for seed in seeds]
    return found


def value_losses() -> list[Experiment]:
    """Stage 1 by outputs, squared outputs and attention weights (Attention Surgery, table of losses)."""
    return [
        Experiment("losses", hybrid(4), STAGE1, seed, transfer={"loss": loss, "output_draws": 0}, note=loss)
        for loss in ("value", "squared", "score") for seed in SEEDS
    ]  # fmt: skip


def degrees() -> list[Experiment]:
    """Stage 1 by maps of several degrees, with as many features (Attention Surgery, table of map sizes)."""
    return [Experiment("degrees", hybrid(4, name_of(degree)), STAGE1, seed) for degree in DEGREES for seed in SEEDS]


def rates_of(rate: float) -> dict[str, float]:
    """Return the inputs that set the learning rates of Fine-tune Student."""
    return {"map_rate": rate, "delta_rate": rate}


SETTINGS: dict[str, dict[str, Any]] = {  # sized for two CPU cores; `--scale` multiplies the updates
    "transfer": {"updates": 150, "learning_rate": 0.01, "loss": "squared", "queries": 256, "held_out": 4,
                 "output_draws": 48},
    "finetune": {"updates": 40, "block_updates": 20, "preset": "ours", "rank": 16, "full_rank": False,
                 "map_rate": 2e-4, "delta_rate": 2e-4, "ema": 0.0, "accumulation": 1, "warmup": 5, "held_out": 4,
                 "checkpointing": False},
}  # fmt: skip
TUNING = SETTINGS["finetune"]["updates"] + SETTINGS["finetune"]["block_updates"]
EQUAL = SETTINGS["transfer"]["updates"] + TUNING
PARTS = (0.25, 0.5)
RECIPE_RATE, OTHER_RATE = 2e-4, 5e-4  # learning rate end to end, of all recipes; another that is tried of each
HALVES = {"updates": EQUAL // 2}, {"updates": EQUAL - EQUAL // 2}  # of the updates on stage 1, the others end to end
NO_TRANSFER = {"updates": 0, "output_draws": 0}
END_TO_END = {"updates": EQUAL, "block_updates": 0, "full_rank": True, **rates_of(RECIPE_RATE)}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # inputs of Distill Attention, of Fine-tune Student
    "ours": (HALVES[0], {"preset": "ours", **END_TO_END, **HALVES[1]}),
    "clear": (NO_TRANSFER, {"preset": "clear", **END_TO_END}),
    "flow matching alone": (NO_TRANSFER, {"preset": FLOW, **END_TO_END}),
    "attention surgery": (
        {"loss": "value", "output_draws": 0},
        {"preset": "attention_surgery", **END_TO_END, "updates": TUNING},
    ),
}
COMPARED = (
    (clear(4), ("ours", "clear", "flow matching alone")),
    (hybrid(4), ("ours", "attention surgery", "flow matching alone")),
)


def recipe(
    suite: str,
    method: Method,
    name: str,
    seed: int,
    *,
    change: str = "",
    factor: float = 1.0,
    transfer: dict[str, Any] | None = None,
    finetune: dict[str, Any] | None = None,
) -> Experiment:
    """Return an experiment with a recipe of `RECIPES`; where there are no maps to learn, ours fine-tunes longer.

    Args:
        suite, method, seed: of the experiment.
        name: of the recipe.
        change: what is changed of it, in words.
        factor: on its updates.
        transfer, finetune: inputs that are changed.
    """
    own_transfer, own_finetune = RECIPES[name]
    if name == "ours" and not method.has_maps:
        own_finetune = {**own_finetune, "updates": EQUAL}
    return Experiment(
        suite, method, ALL, seed, {**own_transfer, **(transfer or {})}, {**own_finetune, **(finetune or {})},
        note=f"{name}, {change}" if change else name, factor=factor,
    )  # fmt: skip


def inputs_of(experiment: Experiment, scale: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what Distill Attention and Fine-tune Student are given for an experiment, its updates times `scale`.

    A stage that its training leaves out, or that has nothing to learn, has 0 updates.
    """
    matrices, maps, blocks, end = TRAININGS[experiment.training]
    transfer = {**SETTINGS["transfer"], **experiment.transfer, "seed": experiment.seed}
    finetune = {**SETTINGS["finetune"], **experiment.finetune, "seed": experiment.seed}
    transfer["output_draws"] *= matrices
    factor = scale * experiment.factor
    for settings, name, runs in ((transfer, "updates", maps and experiment.method.has_maps),
                                 (finetune, "block_updates", blocks), (finetune, "updates", end)):  # fmt: skip
        settings[name] = round(settings[name] * factor) if runs else 0
    return transfer, finetune


def num_updates(experiment: Experiment, scale: float = 1.0) -> int:
    """Return the updates of all stages together, each times `scale`; the passes of stage 0 take none."""
    transfer, finetune = inputs_of(experiment, scale)
    return transfer["updates"] + finetune["block_updates"] + finetune["updates"]


def recipes() -> list[Experiment]:
    """Ours against each paper's own recipe at equal updates; flow matching alone against distillation."""
    return [recipe("recipes", method, name, seed) for seed in SEEDS for method, names in COMPARED for name in names]


def settings() -> list[Experiment]:
    """Each recipe as it is and with something changed, so that none is held back by what suits another."""
    found = []
    for method, names in COMPARED:
        for name in names:
            changes = [
                ("unchanged", {}, {}),
                (f"rate {OTHER_RATE:g}", {}, rates_of(OTHER_RATE)),
                ("even noise levels", {}, {"preset": f"{RECIPES[name][1]['preset']}, even"}),
            ]
            if name == "ours":
                none, even = {"output_draws": 0}, changes[2][2]
                changes += [("no matrices", none, {}), ("no matrices, even noise levels", none, even)]
            if name == "attention surgery":
                changes += [("half on stage 1", *HALVES)]
            if name == "flow matching alone" and method.has_maps:  # attention surgery's without its first stage
                changes += [("middle noise levels", {}, {"preset": f"{FLOW}, middle"})]
            found += [recipe("settings", method, name, 0, change=change, transfer=transfer, finetune=finetune)
                      for change, transfer, finetune in changes]  # fmt: skip
    return found


def noise_levels() -> list[Experiment]:
    """How noise levels are drawn end to end, everything else equal."""
    return [
        Experiment("noise levels", clear(4), ALL, seed, note=draws,
                   finetune={"preset": f"ours, {draws}", "updates": 150, "block_updates": 0})
        for draws in NOISE_LEVELS for seed in SEEDS
    ]  # fmt: skip


def curve() -> list[Experiment]:
    """Ours against each paper's own recipe at fewer updates."""
    return [recipe("curve", method, name, 0, change=f"{part:.0%} of the updates", factor=part)
            for part in PARTS for method, names in COMPARED for name in names[:2]]  # fmt: skip


def real_data() -> list[Experiment]:
    """Samples of the teacher against drawn scenes, everything else equal (CLEAR's table on data)."""
    return [
        Experiment("data", clear(4), ALL, seed, samples=samples, note=samples, finetune={"preset": "clear"})
        for samples in ("teacher", "real") for seed in SEEDS
    ]  # fmt: skip


def budgets() -> list[Experiment]:
    """The optimal mixture against the same kind everywhere, under one limit (Attention Surgery, mixed rates)."""
    return [
        Experiment("budgets", Method(f"{planner} {budget:.0%}", CANDIDATES, budget, planner), ALL, seed,
                   transfer={"output_draws": 0})
        for budget in BUDGETS for planner in ("optimal", "homogeneous") for seed in SEEDS
    ]  # fmt: skip


def sizes() -> list[Experiment]:
    """Students of 32 x 32 tokens at 48 x 48, 2.25 times the tokens."""
    return [
        Experiment("sizes", method, training, tokens=48)
        for method in (clear(4), linear("polynomial"), hybrid(4)) for training in (UNTRAINED, ALL)
    ]  # fmt: skip


VIDEO_TOKENS = 16
VIDEO_CANDIDATES = sum((hybrid(rate, "hedgehog").specs for rate in (2, 4, 8)), clear(4).specs + clear(6).specs)
VIDEO_BUDGETS = (0.25, 0.5, 0.7)
VIDEO_METHODS = (
    Method("clear 3-D r=4", ({"kind": "clear", "radius": 4, "temporal_radius": 3},)), linear("polynomial"),
    hybrid(2), hybrid(4), hybrid(8), hybrid(4, stabilizer="lse"),
    chunked(1, 0), chunked(1, 1), chunked(1, 1, causal=True), chunked(2, 1),
)  # fmt: skip


def video() -> list[Experiment]:
    """Every method on the video teacher."""
    found = []
    for method in VIDEO_METHODS:
        for training in (UNTRAINED, STAGE1, ALL) if method.has_maps else (UNTRAINED, STAGE0, ALL):
            seeds = SEEDS if training in (STAGE1, ALL) else SEEDS[:1]
            found += [Experiment("video", method, training, seed, tokens=VIDEO_TOKENS) for seed in seeds]
    return found


def video_losses() -> list[Experiment]:
    """As `value_losses`, on the video teacher."""
    return [replace(each, suite="video losses", tokens=VIDEO_TOKENS) for each in value_losses()]


def video_budgets() -> list[Experiment]:
    """As `budgets`, on the video teacher."""
    return [
        Experiment("video budgets", Method(f"{planner} {budget:.0%}", VIDEO_CANDIDATES, budget, planner), ALL, seed,
                   transfer={"output_draws": 0}, tokens=VIDEO_TOKENS)
        for budget in VIDEO_BUDGETS for planner in ("optimal", "homogeneous") for seed in SEEDS
    ]  # fmt: skip


IMAGE_SUITES = {
    "losses": value_losses, "degrees": degrees, "recipes": recipes, "noise levels": noise_levels, "data": real_data,
    "methods": methods, "budgets": budgets, "sizes": sizes, "curve": curve, "settings": settings,
}  # fmt: skip
VIDEO_SUITES = {"video": video, "video losses": video_losses, "video budgets": video_budgets}
SUITES = {**IMAGE_SUITES, **VIDEO_SUITES}
TEACHER = {**dict.fromkeys(IMAGE_SUITES, "lake"), **dict.fromkeys(VIDEO_SUITES, "clips")}
