"""What the papers claim, each put to the rows of results.csv: reproduced here, not reproduced, or not measured."""

import statistics
from dataclasses import dataclass

from degrees import name_of
from experiments import BUDGETS, UNTRAINED, VIDEO_BUDGETS, VIDEO_TOKENS

Row = dict[str, str]
CLEAR, SURGERY, REHYAT = "CLEAR, arXiv 2412.16112", "Attention Surgery, arXiv 2509.24899", "ReHyAt, arXiv 2601.04342"


@dataclass(frozen=True)
class Group:
    """Rows that are alike but for the seed.

    Args:
        suite, method, training, note: as in results.csv.
        tokens: a side. scale: factor on the updates.
    """

    suite: str
    method: str
    training: str = "all stages"
    note: str = ""
    tokens: int = 32
    scale: str = "1.0"

    def rows(self, rows: list[Row]) -> dict[str, Row]:
        """Return the group's rows by seed, the newest of each."""
        want = (self.suite, self.method, self.training, self.note, str(self.tokens), self.scale)
        names = ("suite", "method", "training", "note", "tokens", "scale")
        return {row["seed"]: row for row in rows if tuple(row[name] for name in names) == want}


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
    groups: tuple[Group, ...] = ()
    factor: float = 1.0

    def verdict(self, rows: list[Row]) -> str:
        """Return "reproduced", "mixed", "not reproduced" or "not measured", with the means and how many seeds agree.

        Notes:
            Reproduced means that every seed agrees. What nothing is trained of has one row, which stands for all seeds.
        """
        found = [group.rows(rows) for group in self.groups]
        if not found or not all(found):
            return "not measured"
        trained = [set(each) for group, each in zip(self.groups, found, strict=True) if group.training != UNTRAINED]
        seeds = sorted(set.intersection(*trained))
        if not seeds:
            return "not measured with a common seed"
        every = [[each.get(seed) or next(iter(each.values())) for each in found] for seed in seeds]
        by_seed = [[float(row["error"]) for row in line] for line in every]
        agree = sum(map(self._holds, by_seed))
        means = [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
        word = "reproduced" if agree == len(seeds) else "mixed" if self._holds(means) else "not reproduced"
        count = f"{agree} of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        odd = sum(bool(row.get("outcome")) for line in every for row in line)
        more = f"; in {odd} of these runs fine-tuning stopped early or made it worse" if odd else ""
        sign = " > " if self.factor >= 1 else " vs "
        return f"{word}: {sign.join(f'{mean:.4f}' for mean in means)}, {count}{more}"

    def _holds(self, errors: list[float]) -> bool:
        falls = self.factor < 1 or all(worse > better for worse, better in zip(errors, errors[1:], strict=False))
        return falls and errors[0] >= self.factor * errors[-1]


def _video(method: str, training: str = "all stages") -> Group:
    return Group("video", method, training, tokens=VIDEO_TOKENS)


HYBRID, WINDOWS, LINEAR = "hybrid R=4 polynomial max", "clear r=4", "linear polynomial"
CLAIMS = (
    Claim("larger windows are better", CLEAR, tuple(Group("methods", f"clear r={radius}") for radius in (2, 4, 6))),
    Claim(
        "distillation losses beside flow matching are better than flow matching alone", CLEAR,
        (Group("recipes", WINDOWS, note="flow matching alone"), Group("recipes", WINDOWS, note="clear")),
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
        "what is trained at one size gains at a larger one too: windows, at least half of the error", CLEAR,
        (Group("sizes", WINDOWS, "untrained", tokens=48), Group("sizes", WINDOWS, tokens=48)), 2.0,
    ),
    Claim(
        "attention distilled site by site is better than untrained, fine-tuned better still", SURGERY,
        (Group("methods", HYBRID, "untrained"), Group("methods", HYBRID, "stage 1"), Group("methods", HYBRID)),
    ),
    Claim(
        "comparing outputs is better than comparing attention weights", SURGERY,
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
        "pooled far keys beside windows are better", CLEAR,
        (Group("methods", WINDOWS), Group("methods", f"{WINDOWS} pooled 2")),
    ),
    Claim(
        "video: attention distilled site by site is better than untrained, fine-tuned better still", SURGERY,
        (_video(HYBRID, "untrained"), _video(HYBRID, "stage 1"), _video(HYBRID)),
    ),
    Claim(
        "video: more exact keys are better: R = 8, 4, 2", SURGERY,
        tuple(_video(f"hybrid R={rate} polynomial max") for rate in (8, 4, 2)),
    ),
    Claim(
        "video: comparing outputs is better than comparing attention weights", SURGERY,
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
    Claim(
        "causal chunks cost nothing (a tenth more error is allowed)", REHYAT,
        (_video("chunked 1 overlap 1"), _video("chunked 1 overlap 1 causal")), 1 / 1.1,
    ),
    Claim(
        "ours: a radius per head, by attention mass, is better than one radius at equal cost", "here",
        (Group("methods", WINDOWS), Group("methods", f"{WINDOWS} per head")),
    ),
    Claim(
        "ours: half of the error of CLEAR's recipe at equal updates", "here",
        (Group("recipes", WINDOWS, note="clear"), Group("recipes", WINDOWS, note="ours")), 2.0,
    ),
    Claim(
        "ours: half of the error of Attention Surgery's recipe at equal updates", "here",
        (Group("recipes", HYBRID, note="attention surgery"), Group("recipes", HYBRID, note="ours")), 2.0,
    ),
)  # fmt: skip
