"""The papers' claims, each put to the rows of results.csv: reproduced, not reproduced, or not measured."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .degrees import name_of
from .experiments import BUDGETS, UNTRAINED, VIDEO_BUDGETS, VIDEO_TOKENS, settings

Row = Mapping[str, str]
CLEAR, SURGERY, REHYAT = "CLEAR, arXiv 2412.16112", "Attention Surgery, arXiv 2509.24899", "ReHyAt, arXiv 2601.04342"


@dataclass(frozen=True)
class Measure:
    """What a claim is put to.

    Args:
        column: of results.csv.
        form: of its numbers, as `format` takes it.
        is_decibel: it is PSNR, whose squared errors fall where it rises; else it is the error itself.
    """

    column: str
    form: str
    is_decibel: bool = False

    def error(self, value: float) -> float:
        """Return the error that a value stands for."""
        return 10 ** (-value / 10) if self.is_decibel else value


VELOCITY, PICTURES = Measure("error", ".4f"), Measure("psnr", ".2f", is_decibel=True)


@dataclass(frozen=True)
class Group:
    """Rows that are alike but for the seed.

    Args:
        suite, method, training, note: as in results.csv.
        tokens: a side.
    """

    suite: str
    method: str
    training: str = "all stages"
    note: str = ""
    tokens: int = 32

    def rows(self, rows: Sequence[Row], measure: Measure | None = None) -> dict[str, Row]:
        """Return the group's rows by seed, the newest of each, of rows of one scale, whatever is measured."""
        key = (self.suite, self.method, self.training, self.note, str(self.tokens))
        names = ("suite", "method", "training", "note", "tokens")
        return {row["seed"]: row for row in rows if tuple(row[name] for name in names) == key}


@dataclass(frozen=True)
class Best:
    """The best of several groups, by what is measured, for each seed that all of them have.

    Args:
        groups: one recipe with several settings.
    """

    groups: tuple[Group, ...]
    training: str = "all stages"

    def rows(self, rows: Sequence[Row], measure: Measure = VELOCITY) -> dict[str, Row]:
        """Return the row with the least error by seed."""
        found = [group.rows(rows) for group in self.groups]
        return {
            seed: min((each[seed] for each in found), key=lambda row: measure.error(float(row[measure.column])))
            for seed in sorted(set.intersection(*map(set, found)))
        }


@dataclass(frozen=True)
class Outcome:
    """What the rows say of a claim.

    Args:
        word: "reproduced" if every seed agrees, "mixed" if only the mean does, else "not reproduced".
        means: of the groups, from worst to best by the claim. errors: what they stand for.
        agree: number of seeds that agree. seeds: number of seeds.
        odd: runs that did not go as the recipe says.
    """

    word: str
    means: tuple[float, ...]
    errors: tuple[float, ...]
    agree: int
    seeds: int
    odd: int


@dataclass(frozen=True)
class Claim:
    """An ordering: the error falls from each group to the next.

    Args:
        text: what is claimed, in our words. source: by whom.
        groups: from worst to best.
        factor: by which the error of the first is to exceed that of the last, at least; below 1 the last may be worse
            by that much, and no order is asked for.
    """

    text: str
    source: str
    groups: tuple[Group | Best, ...]
    factor: float = 1.0

    def outcome(self, rows: Sequence[Row], measure: Measure = VELOCITY) -> Outcome | str:
        """Return what the rows say, or why they say nothing.

        Args:
            rows: of one scale.
            measure: what is compared; `factor` is of errors, whatever the measure.

        Notes:
            What nothing is trained of has one row, which stands for all seeds.
        """
        found = [group.rows(rows, measure) for group in self.groups]
        if not all(found):
            return "not measured"
        trained = [set(each) for group, each in zip(self.groups, found, strict=True) if group.training != UNTRAINED]
        seeds = sorted(set.intersection(*trained))
        if not seeds:
            return "not measured with a common seed"
        every = [[each.get(seed) or next(iter(each.values())) for each in found] for seed in seeds]
        by_seed = [[float(row[measure.column]) for row in line] for line in every]
        agree = sum(self._holds([measure.error(value) for value in line]) for line in by_seed)
        means = [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
        errors = [measure.error(mean) for mean in means]
        word = "reproduced" if agree == len(seeds) else "mixed" if self._holds(errors) else "not reproduced"
        odd = sum(bool(row.get("outcome")) for line in every for row in line)
        return Outcome(word, tuple(means), tuple(errors), agree, len(seeds), odd)

    def verdict(self, rows: Sequence[Row], measure: Measure = VELOCITY) -> str:
        """Return the outcome in words: the verdict, the means, and how many seeds agree."""
        outcome = self.outcome(rows, measure)
        if isinstance(outcome, str):
            return outcome
        count = f"{outcome.agree} of {outcome.seeds} seed{'s' if outcome.seeds > 1 else ''}"
        more = f"; {outcome.odd} of these runs did not go as the recipe says" if outcome.odd else ""
        return f"{outcome.word}: {_chain(outcome.means, measure)}{self._ratio(outcome.errors)}, {count}{more}"

    def _holds(self, errors: Sequence[float]) -> bool:
        falls = self.factor < 1 or all(worse > better for worse, better in pairwise(errors))
        return falls and errors[0] >= self.factor * errors[-1]

    def _ratio(self, errors: Sequence[float]) -> str:
        if self.factor == 1:
            return ""
        return f" (error {errors[0] / errors[-1]:.2f} times, needed {self.factor:.2g})"


def _chain(values: Sequence[float], measure: Measure) -> str:
    text = format(values[0], measure.form)
    for one, other in pairwise(values):
        text += f" {'>' if one > other else '<'} {other:{measure.form}}"
    return text


def _video(method: str, training: str = "all stages") -> Group:
    return Group("video", method, training, tokens=VIDEO_TOKENS)


def _best(method: str, name: str) -> Best:
    """Return a recipe at the best of the settings that were tried of it."""
    notes = (each.note for each in settings() if each.method.name == method and each.note.startswith(f"{name}, "))
    return Best(tuple(Group("settings", method, note=note) for note in notes))


HYBRID, WINDOWS, LINEAR = "hybrid R=4 polynomial max", "clear r=4", "linear polynomial"
CLAIMS = (
    Claim("larger windows are better", CLEAR, tuple(Group("methods", f"clear r={radius}") for radius in (2, 4, 6))),
    Claim(
        "distillation losses beside flow matching are better than flow matching alone", CLEAR,
        (Group("recipes", WINDOWS, note="flow matching alone"), Group("recipes", WINDOWS, note="clear")),
    ),
    Claim(
        "the same, each at the best of the settings that were tried of it", CLEAR,
        (_best(WINDOWS, "flow matching alone"), _best(WINDOWS, "clear")),
    ),
    Claim(
        "the teacher's own pictures are better to train on than real ones", CLEAR,
        (Group("data", WINDOWS, note="real"), Group("data", WINDOWS, note="teacher")),
    ),
    Claim(
        "linear attention without locality is worse than windows", CLEAR,
        (Group("methods", LINEAR), Group("methods", WINDOWS)),
    ),
    Claim(
        "video: linear attention without locality is worse than windows", CLEAR,
        (_video(LINEAR), _video("clear 3-D r=4")),
    ),
    Claim(
        "windows trained at one size are good at a larger one: training halves the error there (our threshold)", CLEAR,
        (Group("sizes", WINDOWS, "untrained", tokens=48), Group("sizes", WINDOWS, tokens=48)), 2.0,
    ),
    Claim(
        "distilling site by site before fine-tuning is better than fine-tuning alone, at equal updates", SURGERY,
        tuple(Group("settings", HYBRID, note=note)
              for note in ("flow matching alone, middle noise levels", "attention surgery, unchanged")),
    ),
    Claim(
        "the same, each at the best of the settings that were tried of it", SURGERY,
        (_best(HYBRID, "flow matching alone"), _best(HYBRID, "attention surgery")),
    ),
    Claim(
        "comparing outputs is better than comparing attention weights (here after stage 1)", SURGERY,
        (Group("losses", HYBRID, "stage 1", "score"), Group("losses", HYBRID, "stage 1", "value")),
    ),
    Claim(
        "more exact keys are better: R = 8, 4, 2", SURGERY,
        tuple(Group("methods", f"hybrid R={rate} polynomial max") for rate in (8, 4, 2)),
    ),
    *(
        Claim(
            f"a mixture is better than one kind under one limit: {share} of dense", SURGERY,
            (Group("budgets", f"homogeneous {share}"), Group("budgets", f"optimal {share}")),
        )
        for share in (f"{budget:.0%}" for budget in BUDGETS)
    ),
    Claim(
        "degree 2 is enough: degree 4, with as many features, is not better by more than a tenth", SURGERY,
        tuple(Group("degrees", f"hybrid R=4 {name_of(degree)} max", "stage 1") for degree in (4, 2)), 1 / 1.1,
    ),
    Claim(
        "pooled far keys beside windows are better than wider windows of their cost (here with stage 1 besides)", CLEAR,
        (Group("methods", "clear r=12"), Group("methods", f"{WINDOWS} pooled 2")),
    ),
    Claim(
        "video: more exact keys are better: R = 8, 4, 2", SURGERY,
        tuple(_video(f"hybrid R={rate} polynomial max") for rate in (8, 4, 2)),
    ),
    Claim(
        "video: comparing outputs is better than comparing attention weights (here after stage 1)", SURGERY,
        tuple(Group("video losses", HYBRID, "stage 1", loss, VIDEO_TOKENS) for loss in ("score", "value")),
    ),
    *(
        Claim(
            f"video: a mixture is better than one kind under one limit: {share} of dense", SURGERY,
            tuple(Group("video budgets", f"{planner} {share}", tokens=VIDEO_TOKENS)
                  for planner in ("homogeneous", "optimal")),
        )
        for share in (f"{budget:.0%}" for budget in VIDEO_BUDGETS)
    ),
    Claim(
        "chunks that overlap are better", REHYAT,
        (_video("chunked 1 overlap 0"), _video("chunked 1 overlap 1")),
    ),
    Claim("larger chunks are better", REHYAT, (_video("chunked 1 overlap 1"), _video("chunked 2 overlap 1"))),
    Claim(
        "causal chunks, here of one frame, cost nothing (a tenth more error is allowed)", REHYAT,
        (_video("chunked 1 overlap 1"), _video("chunked 1 overlap 1 causal")), 1 / 1.1,
    ),
    Claim(
        "stage 1 is better than untrained, all stages better still", "here",
        (Group("methods", HYBRID, "untrained"), Group("methods", HYBRID, "stage 1"), Group("methods", HYBRID)),
    ),
    Claim(
        "video: stage 1 is better than untrained, all stages better still", "here",
        (_video(HYBRID, "untrained"), _video(HYBRID, "stage 1"), _video(HYBRID)),
    ),
    Claim(
        "a radius per head, by attention mass, is better than one radius at equal cost", "here",
        (Group("methods", WINDOWS), Group("methods", f"{WINDOWS} per head")),
    ),
    *(
        claim
        for method, paper, theirs in ((WINDOWS, "CLEAR", "clear"), (HYBRID, "Attention Surgery", "attention surgery"))
        for claim in (
            Claim(
                f"our recipe leaves half of the error of {paper}'s at equal updates", "here",
                (Group("recipes", method, note=theirs), Group("recipes", method, note="ours")), 2.0,
            ),
            Claim(
                "the same, each at the best of the settings that were tried of it", "here",
                (_best(method, theirs), _best(method, "ours")), 2.0,
            ),
        )
    ),
)  # fmt: skip
