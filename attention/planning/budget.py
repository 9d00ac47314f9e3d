"""A student's candidates with their cost at a size, one chosen per site under a budget, as text too.

The choice itself is made in `knapsack.py`. Nothing here runs a model or changes a weight.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ..hosts import Host
from ..layout import TokenLayout
from ..plans import Plan, describe_sites, select_sites
from ..shown import quote
from ..specs import DenseSpec, SiteSpec
from ..students.candidates import Candidate, Candidates
from ..words import counted
from .cost import attention_cost
from .knapsack import METHODS, BudgetPlan, Option, SiteOptions, plan_under_budget
from .report import describe_spec, describe_specs


@dataclass(frozen=True, slots=True)
class Budget:
    """What a student may cost, and where.

    Args:
        budget: share of the FLOPs of dense attention, above 0, at most 1.
        width, height, frames: size of the picture or clip, in pixels and frames.
        method: one of METHODS.
        keep_dense: expression of sites that stay dense, or empty.
        max_error: candidates with a higher error are not used; 0 is off.
    """

    budget: float
    width: int
    height: int
    frames: int = 1
    method: str = METHODS[0]
    keep_dense: str = ""
    max_error: float = 0.0


class Count(Protocol):
    """What a budget counts; `words` names it."""

    words: str

    def cost(self, spec: SiteSpec, layout: TokenLayout, num_heads: int, head_dim: int, *, has_matrices: bool) -> int:
        """Return the cost of one forward of a site, above 0, in whole units."""
        ...


class Operations:
    """Counts floating point operations."""

    words = "FLOPs"

    def cost(self, spec: SiteSpec, layout: TokenLayout, num_heads: int, head_dim: int, *, has_matrices: bool) -> int:
        """Return the FLOPs of one forward of a site."""
        return attention_cost(spec, layout, num_heads, head_dim, has_matrices=has_matrices).flops


OPERATIONS = Operations()


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A student with one candidate per site, its plan that names every site, and a text for people."""

    student: Candidates
    plan: Plan
    text: str


def decide(student: Candidates, host: Host, module: Any, budget: Budget, count: Count = OPERATIONS) -> Decision:
    """Choose what each site of a model runs.

    Args:
        student: candidates; a loaded student has one per site.
        host, module: the model.
        budget: see there.
        count: what it counts.

    Returns:
        The decision; the budget and its figures stand in the student's recipe.

    Raises:
        ValueError: as `site_options` and `plan_under_budget`.
    """
    sites = [site.id for site in host.sites(module)]
    layout = host.planned_layout(module, budget.width, budget.height, budget.frames, host.default_text_tokens)
    dense = select_sites(budget.keep_dense, sites) if budget.keep_dense.strip() else ()
    options = site_options(student, host, module, layout, keep_dense=dense, max_error=budget.max_error, count=count)
    plan, baseline = plan_under_budget(options, budget.budget, budget.method)
    facts = {
        **asdict(budget), "count": count.words, "share": plan.share, "summed_error": plan.error,
        "homogeneous_error": baseline.error if baseline else None,
    }  # fmt: skip
    specs: dict[str, SiteSpec] = dict.fromkeys(sites, DenseSpec())
    specs.update({site: option.spec for site, option in plan.chosen.items()})
    size = f"{budget.width} x {budget.height}" + (f" x {budget.frames}" if budget.frames > 1 else "")
    lines = describe_plan(options, budget.budget, plan, baseline, count.words)
    return Decision(
        replace(student.chosen(plan.choice), recipe={**student.recipe, "budget": facts}),
        Plan.of_sites(host.name, specs),
        "\n".join((f"{host.title}, {size}:", *lines, *_left_out(student, options))),
    )


def _left_out(student: Candidates, options: Sequence[SiteOptions]) -> tuple[str, ...]:
    count = sum(map(len, student.sites.values())) - sum(len(site.options) for site in options)
    if not count:
        return ()
    return (f"{count} {'candidates' if count > 1 else 'candidate'} not used: keep_dense, max_error, or not measured",)


def site_options(
    student: Candidates,
    host: Host,
    module: Any,
    layout: TokenLayout,
    *,
    keep_dense: Collection[str] = (),
    max_error: float = 0.0,
    count: Count = OPERATIONS,
) -> tuple[SiteOptions, ...]:
    """Return what each site of a model can run, with costs and errors.

    Args:
        student: candidates with their errors; one without a measured error is left out.
        host, module: the model.
        layout: the tokens of a forward.
        keep_dense: sites that get no option.
        max_error: candidates with a higher error are left out; 0 leaves out none.
        count: what the costs are.

    Raises:
        ValueError: the student is for another host, names a site or a number of heads that the model does not have,
            has no candidate or no measured error, or has changed weights, which belong to the plan they were made for.
    """
    if student.host != host.name:
        raise ValueError(f"the student is for host {quote(student.host)}, this model is {quote(host.name)}")
    if not student.sites:
        raise ValueError("the student has no candidates to choose from; distil some with Distill Attention")
    if not any(math.isfinite(each.error) for candidates in student.sites.values() for each in candidates):
        raise ValueError("the student holds no measured errors to choose by; distil it again with Distill Attention")
    if student.deltas:
        raise ValueError("the student's weights were changed for the plan it has; choose a budget before fine-tuning")
    sites = host.sites(module)
    strange = [site for site in student.sites if site not in {each.id for each in sites}]
    if strange:
        raise ValueError(
            f"the student has candidates for {describe_sites(strange)}, this model has only"
            f" {describe_sites([site.id for site in sites])}"
        )
    found = []
    for site in sites:
        own, sizes = host.site_layout(site.id, layout), (site.num_heads, site.head_dim)
        candidates = () if site.id in keep_dense else student.sites.get(site.id, ())
        try:
            options = tuple(
                Option(number, each.spec, each.error, _cost(count, each, own, *sizes))
                for number, each in enumerate(candidates)
                if math.isfinite(each.error) and not 0 < max_error < each.error
            )
        except ValueError as error:
            raise ValueError(f"the student does not fit {site.id}: {error}") from None
        found.append(SiteOptions(site.id, count.cost(DenseSpec(), own, *sizes, has_matrices=False), options))
    return tuple(found)


def _cost(count: Count, candidate: Candidate, layout: TokenLayout, num_heads: int, head_dim: int) -> int:
    has_matrices = "output.weight" in candidate.parameters
    return count.cost(candidate.spec, layout, num_heads, head_dim, has_matrices=has_matrices)


def describe_plan(
    sites: Sequence[SiteOptions],
    budget: float,
    plan: BudgetPlan,
    baseline: BudgetPlan | None,
    counted_in: str = OPERATIONS.words,
) -> tuple[str, ...]:
    """Return lines for people: kinds by number of sites, share kept, errors, and those of the homogeneous plan."""
    specs: dict[str, SiteSpec] = {
        site.site: plan.chosen[site.site].spec if site.site in plan.chosen else DenseSpec() for site in sites
    }
    lines = describe_specs(specs)
    lines.append(f"attention kept: {plan.share:.1%} of dense {counted_in}, budget {budget:.1%}")
    if not plan.chosen:
        return (*lines, "every site stays dense; a lower budget converts some")
    worst = max(plan.chosen, key=lambda site: plan.chosen[site].error)
    lines.append(f"summed error {plan.error:.4g}, highest {plan.chosen[worst].error:.4g} at {worst}")
    if not plan.is_proven and plan is not baseline:
        lines.append("the search was over before this plan was proven the best; a better one may exist")
    if baseline is None:
        return (*lines, "one kind alone: none reaches this budget")
    if not baseline.chosen:
        return (*lines, "dense attention everywhere is within the budget")
    spec = next(iter(baseline.chosen.values())).spec
    converted = counted(len(baseline.chosen), "site")
    return (*lines, f"one kind alone: {describe_spec(spec)} at {converted}, summed error {baseline.error:.4g}")
