"""The choice of what each site runs, from measured seconds and errors, checked and corrected on the whole model.

Summed errors of sites are not the model's error: what a site misses may matter more, or less, behind it. So each site
has a weight. A check of a plan scales the weights until they tell its error; a check of a part of the sites tells that
part's weights from the others'.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..planning.knapsack import BudgetPlan, SiteOptions, plan_under_budget, plan_within_error
from ..specs import SiteSpec
from .measures import Checked, SiteMeasures

GOALS = ("error", "time")
Check = Callable[[Mapping[str, SiteSpec]], Checked]
START = 2.0  # times the error asked for, that the first plan may have a site; the first check corrects it
NEAR = 0.8  # of the error asked for; a plan above it is near enough
MARGIN = 0.92  # of the error asked for, that a plan is made for: errors are not sums
MORE_CHECKS = 4  # where no checked plan is within the error


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for.

    Args:
        goal: "error" for the least time within an error of the velocity, "time" for the least error within a share of
            the time that dense attention takes.
        value: the error, above 0; or the share, above 0 and at most 1.
    """

    goal: str
    value: float

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"goal is one of {', '.join(GOALS)}, got {self.goal!r}")
        if not 0 < self.value <= 1:
            raise ValueError(f"{self.goal} is above 0 and at most 1, got {self.value:g}")


@dataclass(frozen=True, slots=True)
class Choice:
    """What each site runs.

    Args:
        specs: by site, without those that stay dense.
        weights: by site, what its error counts; predicted errors are sums of weight times error.
        predicted: the velocity's error by the weights.
        checked: what the whole model gave; None where it was not run.
        is_within: whether the target is met, as far as it was checked.
    """

    specs: Mapping[str, SiteSpec]
    weights: Mapping[str, float]
    predicted: float
    checked: Checked | None
    is_within: bool = True


def choose(
    sites: Sequence[SiteMeasures], target: Target, check: Check, most_checks: int, dense_seconds: float = math.inf
) -> Choice:
    """Return the best plan found with at most `most_checks` checks (some more where none is within an error).

    Args:
        sites: of one model.
        target: what is asked for.
        check: runs the whole model with a plan.
        most_checks: at least 1.
        dense_seconds: of a step; a plan whose step is no faster is not taken, whatever its calls take alone.
    """
    return _Search(sites, target, check, most_checks, dense_seconds).run()


def choose_unchecked(sites: Sequence[SiteMeasures], target: Target, weights: Mapping[str, float]) -> Choice:
    """Return the best plan by weights that an earlier choice found; nothing runs."""
    plan = _solve(sites, target, weights, target.value * MARGIN)
    return Choice(_specs(plan), dict(weights), plan.error, None, is_within=_is_within(plan, target))


def _is_within(plan: BudgetPlan, target: Target) -> bool:
    return plan.error <= target.value if target.goal == "error" else plan.share <= target.value * (1 + 1e-6)


def _solve(
    sites: Sequence[SiteMeasures], target: Target, weights: Mapping[str, float], most_error: float
) -> BudgetPlan:
    options = [each.options(weights.get(each.site, 1.0)) for each in sites]
    if target.goal == "error":
        return plan_within_error(options, most_error)
    return plan_under_budget(options, max(target.value, _lowest_share(options)))[0]


def _lowest_share(options: Sequence[SiteOptions]) -> float:
    """Return the least share of dense attention that any plan has, a little more for rounding."""
    lowest = sum(min([each.dense_cost, *(option.cost for option in each.options)]) for each in options)
    return min(1.0, (lowest + 1) / sum(each.dense_cost for each in options) + 1e-8)


def _specs(plan: BudgetPlan) -> dict[str, SiteSpec]:
    return {site: option.spec for site, option in plan.chosen.items()}


@dataclass(slots=True)
class _Tried:
    plan: BudgetPlan
    checked: Checked


@dataclass
class _Search:
    """One search; `weights` and `groups` are what it learned so far."""

    sites: Sequence[SiteMeasures]
    target: Target
    check: Check
    most_checks: int
    dense_seconds: float = math.inf
    checks: int = 0
    tried: list[_Tried] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.usable = [each.site for each in self.sites if each.usable]
        self.errors = {each.site: {one.spec: one.error for one in each.usable} for each in self.sites}
        self.weights = dict.fromkeys((each.site for each in self.sites), 1.0)
        self.groups = [self.usable]
        self.most_error = self.target.value * START * max(len(self.usable), 1)

    def run(self) -> Choice:
        """Return what `choose` does."""
        plan = self.solve()
        while plan.chosen:
            if not self.knows(plan):
                self.try_plan(plan)
            elif not self.split():
                break
            if self.checks >= self.most_checks and (self.best() or self.checks >= self.most_checks + MORE_CHECKS):
                break
            plan = self.solve()
        best = self.best()
        if best is None:
            is_within = self.target.goal == "error" or self.target.value == 1
            return Choice({}, self.weights, 0.0, None, is_within)
        specs = _specs(best.plan)
        is_within = self.target.goal == "error" or _is_within(best.plan, self.target)
        return Choice(specs, self.weights, self.predicted(specs), best.checked, is_within)

    def solve(self) -> BudgetPlan:
        """Return the best plan by the weights; near the error that was asked for, the checked one."""
        near = [each for each in self.tried if NEAR <= each.checked.error / self.target.value <= 1]
        if self.target.goal == "error" and near and len(self.groups) == 1:
            return near[-1].plan
        return _solve(self.sites, self.target, self.weights, self.most_error)

    def predicted(self, specs: Mapping[str, SiteSpec]) -> float:
        return math.fsum(self.weights[site] * self.errors[site][spec] for site, spec in specs.items())

    def knows(self, plan: BudgetPlan) -> bool:
        return any(_specs(each.plan) == _specs(plan) for each in self.tried)

    def try_plan(self, plan: BudgetPlan) -> None:
        """Check a plan, and scale all weights so that they tell its error."""
        specs = _specs(plan)
        predicted, checked = self.predicted(specs), self.run_check(specs)
        self.tried.append(_Tried(plan, checked))
        if predicted > 0 and 0 < checked.error < math.inf:
            self.weights = {site: weight * checked.error / predicted for site, weight in self.weights.items()}
        margin = MARGIN ** (1 + max(0, self.checks - self.most_checks + 1))
        self.most_error = self.target.value * margin

    def run_check(self, specs: Mapping[str, SiteSpec]) -> Checked:
        self.checks += 1
        return self.check(specs)

    def split(self) -> bool:
        """Weigh the two halves of the sites that count most apart; return False where no checks are left for that."""
        best = self.best()
        if best is None or self.most_checks - self.checks < 2:
            return False
        specs = _specs(best.plan)

        def share(group: Sequence[str]) -> float:
            return self.predicted({site: specs[site] for site in group if site in specs})

        group = max(self.groups, key=share)
        own = [site for site in group if site in specs]
        if len(own) < 2:
            return False
        middle = group.index(own[len(own) // 2])
        halves = [group[:middle], group[middle:]]
        first, second = ({site: specs[site] for site in half if site in specs} for half in halves)
        whole, alone = share(group), self.run_check(first).error
        # errors of both halves add up to the group's; where one alone has more, the other gets a tenth
        for half, error in ((first, alone), (second, max(whole - alone, 0.1 * whole))):
            predicted = self.predicted(half)
            if predicted > 0 and 0 < error < math.inf:
                scale = error / predicted
                sites = halves[0] if half is first else halves[1]
                self.weights.update({site: self.weights[site] * scale for site in sites})
        place = self.groups.index(group)
        self.groups[place : place + 1] = halves
        return True

    def best(self) -> _Tried | None:
        """Return the best plan of those that were checked, None where none is within the error or none gains."""
        gains = [
            each
            for each in self.tried
            if math.isfinite(each.checked.error) and each.checked.seconds < self.dense_seconds
        ]
        if self.target.goal == "error":
            within = [each for each in gains if each.checked.error <= self.target.value]
            return min(within, key=lambda each: each.plan.cost, default=None)
        return min(gains, key=lambda each: each.checked.error, default=None)
