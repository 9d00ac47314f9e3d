"""The exact choice of one candidate per site under a budget: Attention Surgery's block-rate selection.

Nothing here knows a model: sites come in with what they can run, what that costs (operations or time) and its error.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..specs import DenseSpec, SiteSpec

METHODS = ("optimal", "homogeneous")
PRECISION = 1e-6  # relative, to which the least summed error is found; measured errors have fewer digits
SOLVER_GAP = 3e-6  # the solver drops plans that are better by a third of it, and its bound does not tell
TIME_LIMIT_S = 20.0
DENSE = -1  # number of the option that is no candidate


@dataclass(frozen=True, slots=True)
class Option:
    """What a site can run instead of dense attention.

    Args:
        number: of the candidate at its site.
        spec: kind and parameters.
        error: of the candidate, 0 or more.
        cost: of one forward, in whole units: operations, or nanoseconds.
    """

    number: int
    spec: SiteSpec
    error: float
    cost: int


@dataclass(frozen=True, slots=True)
class SiteOptions:
    """One site with the cost of dense attention, which has no error, and what else it can run."""

    site: str
    dense_cost: int
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """What every site of a model runs.

    Args:
        chosen: the option of each site that is not dense, in the order of the model.
        cost: of all sites together, per forward.
        dense_cost: the same with dense attention everywhere.
        is_proven: whether no other choice within the budget has a lower summed error (to PRECISION), by the solver's
            own bound; false where the time for the search was over or its digits did not suffice, and for homogeneous
            plans.
    """

    chosen: Mapping[str, Option]
    cost: int
    dense_cost: int
    is_proven: bool

    @property
    def share(self) -> float:
        """Cost as a share of dense attention."""
        return self.cost / self.dense_cost

    @property
    def error(self) -> float:
        """Sum of the sites' errors."""
        return math.fsum(option.error for option in self.chosen.values())

    @property
    def choice(self) -> dict[str, int]:
        """The candidate's number by site, as `Candidates.chosen` takes it."""
        return {site: option.number for site, option in self.chosen.items()}


def plan_under_budget(
    sites: Sequence[SiteOptions], budget: float, method: str = METHODS[0]
) -> tuple[BudgetPlan, BudgetPlan | None]:
    """Return the plan of lowest summed error whose cost is within the budget, and the homogeneous plan beside it.

        minimise sum_i e_i(z_i)   subject to   sum_i c_i(z_i) <= budget * sum_i dense_i

    Args:
        sites: of one model.
        budget: share of the cost of dense attention, above 0, at most 1.
        method: "optimal" chooses among all options of all sites. "homogeneous" is the paper's baseline: one spec for
            all sites that are converted, those with the lowest error first, as many as the budget needs; the best of
            such plans.

    Returns:
        The plan, and the homogeneous one, None where no spec alone reaches the budget.

    Raises:
        ValueError: the budget is out of range or cannot be reached (the lowest that can is named), or scipy is missing.

    Source: Attention Surgery (arXiv 2509.24899), its block-rate selection.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget is a share of dense attention, above 0 and at most 1, got budget={budget}")
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got method={method!r}")
    dense = sum(site.dense_cost for site in sites)
    # as a float, 0.3 lies below three tenths, which a plan may have exactly
    limit = math.floor(Fraction(budget).limit_denominator(10**9) * dense)
    ends = [_homogeneous(sites, spec, limit) for spec in _specs(sites)] or [_plan(sites, {})]
    baseline = min((plan for plan in ends if plan.cost <= limit), key=lambda plan: plan.error, default=None)
    if method == "homogeneous":
        if baseline is None:
            raise _unreachable(budget, min(plan.cost for plan in ends) / dense, "one kind alone")
        return baseline, baseline
    choices = [_worthwhile(site) for site in sites]
    lowest = sum(each[0].cost for each in choices)
    if lowest > limit:
        raise _unreachable(budget, lowest / dense, "these candidates")
    found = _optimal(sites, choices, limit)
    return (baseline if baseline is not None and baseline.error < found.error else found), baseline


def plan_within_error(sites: Sequence[SiteOptions], most_error: float) -> BudgetPlan:
    """Return the plan of least cost whose summed error is at most `most_error`, 0 or more; dense is within any.

        minimise sum_i c_i(z_i)   subject to   sum_i e_i(z_i) <= most_error

    Raises:
        ValueError: scipy is missing, or found nothing in time.
    """
    usable = [(site, [each for each in site.options if each.error <= most_error]) for site in sites]
    if most_error <= 0 or not any(options for _, options in usable):
        return _plan(sites, {})
    # the same choice with the two exchanged: errors in whole parts are the limit, cost is what has to be least
    part = most_error * PRECISION / max(len(sites), 1)
    turned = [
        SiteOptions(
            site.site, 0, tuple(Option(o.number, o.spec, float(o.cost), math.ceil(o.error / part)) for o in options)
        )
        for site, options in usable
    ]
    dense = [Option(DENSE, DenseSpec(), float(site.dense_cost), 0) for site in sites]
    choices = [_pareto([first, *each.options]) for first, each in zip(dense, turned, strict=True)]
    found = _optimal(turned, choices, math.floor(most_error / part))
    options = {site.site: {each.number: each for each in site.options} for site in sites}
    chosen = {site: options[site][each.number] for site, each in found.chosen.items()}
    return _plan(sites, chosen, found.is_proven)


def _unreachable(budget: float, lowest: float, what: str) -> ValueError:
    reached = math.ceil(1000 * lowest) / 1000
    return ValueError(
        f"a budget of {budget:g} cannot be reached with {what}, {reached:g} can; raise the budget, keep fewer sites"
        " dense, or distil cheaper candidates"
    )


def _plan(sites: Sequence[SiteOptions], chosen: Mapping[str, Option], is_proven: bool = False) -> BudgetPlan:
    cost = sum(chosen[site.site].cost if site.site in chosen else site.dense_cost for site in sites)
    return BudgetPlan(chosen, cost, sum(site.dense_cost for site in sites), is_proven)


def _specs(sites: Sequence[SiteOptions]) -> tuple[SiteSpec, ...]:
    return tuple(dict.fromkeys(option.spec for site in sites for option in site.options))


def _homogeneous(sites: Sequence[SiteOptions], spec: SiteSpec, limit: int) -> BudgetPlan:
    """Return the plan that converts sites to one spec until the limit is kept or no site is left."""
    usable = {
        site.site: min(options, key=lambda option: option.error)
        for site in sites
        if (options := [each for each in site.options if each.spec == spec and each.cost < site.dense_cost])
    }
    order = sorted(usable, key=lambda site: usable[site].error)
    dense = {site.site: site.dense_cost for site in sites}
    total, count = sum(dense.values()), 0
    while total > limit and count < len(order):
        total += usable[order[count]].cost - dense[order[count]]
        count += 1
    converted = set(order[:count])
    return _plan(sites, {site: option for site, option in usable.items() if site in converted})


def _worthwhile(site: SiteOptions) -> list[Option]:
    """Return what a site can run that has a lower error than all that is as cheap, the cheapest first."""
    return _pareto([Option(DENSE, DenseSpec(), 0.0, site.dense_cost), *site.options])


def _pareto(options: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _optimal(sites: Sequence[SiteOptions], choices: Sequence[Sequence[Option]], limit: int) -> BudgetPlan:
    """Return the plan of lowest summed error; the cheapest one is within the limit."""
    cheapest = [each[0] for each in choices]
    picked, is_proven = _solve(choices, limit)
    # a plan that the solver's tolerance let through bounds the others from below, as it would within the limit
    lowest, step = _error(picked) if is_proven else -math.inf, 0
    while _cost(picked) > limit:
        step = max(10 * step, _cost(picked) - limit)
        picked = _solve(choices, limit - step)[0] if limit - step >= _cost(cheapest) else cheapest
    pairs = zip(sites, picked, strict=True)
    chosen = {site.site: option for site, option in pairs if option.number != DENSE}
    return _plan(sites, chosen, _error(picked) <= lowest * (1 + PRECISION))


def _cost(picked: Sequence[Option]) -> int:
    return sum(option.cost for option in picked)


def _error(picked: Sequence[Option]) -> float:
    return math.fsum(option.error for option in picked)


def _solve(choices: Sequence[Sequence[Option]], limit: int) -> tuple[list[Option], bool]:
    """Return what each site runs, and whether that is proven to be the best (to PRECISION, and as good as any within
    the limit, which the solver may pass by its tolerance).

    Raises:
        ValueError: scipy is missing, or found nothing in time.
    """
    deadline = time.monotonic() + TIME_LIMIT_S
    found = _search(choices, limit, deadline)
    if found is None:
        raise ValueError(f"scipy found no plan in {TIME_LIMIT_S:g} s; choose method homogeneous")
    best, is_proven = found
    while not is_proven and time.monotonic() < deadline:
        # no better plan has an option with a higher error than this plan's; without those, the solver's absolute
        # tolerances are small beside what is left
        largest = _error(best)
        rest = [[option for option in each if option.error <= largest] for each in choices]
        found = _search(rest, limit, deadline)
        if found is None or (_error(found[0]) >= largest and not found[1]):
            break
        best, is_proven = min(best, found[0], key=_error), found[1]
    return best, is_proven


def _search(choices: Sequence[Sequence[Option]], limit: int, deadline: float) -> tuple[list[Option], bool] | None:
    """Return what `_solve` does, of one run of the solver; None where it found no plan."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ValueError("an optimal plan needs scipy; pip install scipy, or choose method homogeneous") from None
    import numpy as np

    options = [option for each in choices for option in each]
    owners = np.repeat(np.arange(len(choices)), [len(each) for each in choices])
    one_each = (owners == np.arange(len(choices))[:, None]).astype(float)
    errors = np.array([option.error for option in options])
    # both sums well above 1, where the solver's absolute tolerances are far below what counts
    factor = 100 / max(errors.max(), 1e-300)
    costs = np.array([option.cost / limit for option in options]) * len(choices)
    result = milp(
        errors * factor,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None], -np.inf, len(choices))],
        options={"mip_rel_gap": PRECISION / 10, "time_limit": max(deadline - time.monotonic(), 1e-3)},
    )
    if result.x is None:
        return None
    picked = [options[int(np.where(owners == site, result.x, -1).argmax())] for site in range(len(choices))]
    bound = -math.inf if result.mip_dual_bound is None else (result.mip_dual_bound - SOLVER_GAP) / factor
    return picked, _error(picked) - max(bound, 0) <= PRECISION * _error(picked)
