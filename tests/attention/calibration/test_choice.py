"""The choice from measures: against every plan there is, with a model whose true weights the search does not know."""

import itertools
import math
import random

import pytest

from linearize.attention.calibration.choice import Target, choose, choose_unchecked
from linearize.attention.calibration.measures import Checked, Measure, SiteMeasures
from linearize.attention.planning.knapsack import plan_within_error
from linearize.attention.specs import ClearSpec

SPECS = [ClearSpec(radius) for radius in (2, 4, 8)]


def sites_of(seed, count=5):
    """Return sites of random seconds and errors; candidates that cost more err less, some cost more than dense."""
    chance, found = random.Random(seed), []
    for number in range(count):
        seconds = sorted(chance.uniform(0.1, 1.2) for _ in SPECS)
        errors = sorted((chance.random() ** 2 for _ in SPECS), reverse=True)
        measures = tuple(Measure(*each) for each in zip(SPECS, seconds, errors, strict=True))
        found.append(SiteMeasures(f"single.{number}", 1.0, 1.0, measures))
    return tuple(found)


class Model:
    """A whole model whose error is a weighted sum of its sites' errors, with a term that no sum has."""

    def __init__(self, sites, seed, curvature=0.0):
        chance = random.Random(1000 + seed)
        self.sites, self.curvature, self.checks = sites, curvature, 0
        self.weights = {each.site: math.exp(chance.uniform(-2, 2)) / 100 for each in sites}

    def error(self, specs):
        errors = {each.site: {one.spec: one.error for one in each.measures} for each in self.sites}
        total = sum(self.weights[site] * errors[site][spec] for site, spec in specs.items())
        return total * (1 + self.curvature * total)

    def check(self, specs):
        self.checks += 1
        return Checked(self.error(specs), 1.0)

    def plans(self):
        """Yield (seconds, error) of every plan of candidates that are faster than dense."""
        options = [[None, *(one.spec for one in each.usable)] for each in self.sites]
        names = [each.site for each in self.sites]
        for picked in itertools.product(*options):
            specs = {name: spec for name, spec in zip(names, picked, strict=True) if spec is not None}
            yield seconds_of(self.sites, specs), self.error(specs)


def seconds_of(sites, specs):
    return sum(
        next((one.seconds for one in each.measures if one.spec == specs.get(each.site)), each.dense_seconds)
        for each in sites
    )


@pytest.mark.parametrize("error", [0.003, 0.01, 0.03])
def test_least_time_stays_within_the_error_and_near_the_fastest_plan(error):
    gaps, dense = [], 0
    for seed in range(20):
        model = Model(sites_of(seed), seed, curvature=3.0)
        choice = choose(model.sites, Target("error", error), model.check, 6)
        assert model.checks <= 6 + 4
        assert model.error(choice.specs) <= error, "what was not checked to be within is not taken"
        if choice.specs:
            assert choice.checked.error == model.error(choice.specs)
        dense += not choice.specs
        fastest = min(seconds for seconds, each in model.plans() if each <= error)
        gaps.append(seconds_of(model.sites, choice.specs) / fastest - 1)
    assert sum(gaps) / len(gaps) < 0.2 and dense < 8, (gaps, dense)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_least_error_stays_within_the_time(share):
    for seed in range(15):
        model = Model(sites_of(seed), seed)
        lowest = min(seconds for seconds, _ in model.plans()) / len(model.sites)
        choice = choose(model.sites, Target("time", share), model.check, 5)
        found = seconds_of(model.sites, choice.specs) / len(model.sites)
        assert found <= max(share, lowest) + 1e-6
        assert choice.is_within == (lowest <= share)


def test_more_checks_find_plans_that_err_less():
    """Where weights differ by e^4 the sum misleads; halving the sites tells them apart."""
    few, many = [], []
    for seed in range(25):
        sites = sites_of(seed, count=6)
        for checks, errors in ((1, few), (16, many)):
            model = Model(sites, seed)
            errors.append(model.error(choose(sites, Target("time", 0.6), model.check, checks).specs))
            assert model.checks <= checks
    assert all(b <= a * (1 + 1e-9) for a, b in zip(few, many, strict=True)), "the best of all that were checked"
    assert sum(many) < 0.8 * sum(few)


def test_weights_that_were_learned_choose_again_without_a_model():
    model = Model(sites_of(3), 3)
    target = Target("error", 0.02)
    choice = choose(model.sites, target, model.check, 6)
    again = choose_unchecked(model.sites, target, choice.weights)
    assert again.checked is None and 0 < again.predicted <= target.value
    assert seconds_of(model.sites, again.specs) <= seconds_of(model.sites, choice.specs) * 1.1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("goal", ["error", "time"])
def test_a_plan_whose_forward_breaks_is_never_taken(goal, broken):
    sites = sites_of(2)
    choice = choose(sites, Target(goal, 0.5), lambda specs: Checked(broken, 0.5), 5)
    assert choice.specs == {} and all(math.isfinite(weight) for weight in choice.weights.values())


@pytest.mark.parametrize("goal", ["error", "time"])
def test_a_plan_whose_step_is_no_faster_is_not_taken(goal):
    model = Model(sites_of(2), 2)
    assert choose(model.sites, Target(goal, 0.5), model.check, 5, dense_seconds=0.9).specs == {}
    assert choose(model.sites, Target(goal, 0.5), model.check, 5, dense_seconds=1.1).specs


def test_nothing_that_is_faster_leaves_all_dense():
    slow = tuple(SiteMeasures(f"single.{n}", 1.0, 1.0, (Measure(SPECS[0], 1.0, 0.1),)) for n in range(3))
    for target in (Target("error", 0.5), Target("time", 0.5)):
        choice = choose(slow, target, lambda specs: pytest.fail("nothing to check"), 4)
        assert choice.specs == {} and choice.checked is None
        assert choice.is_within == (target.goal == "error")


def test_a_site_that_cannot_be_measured_stays_dense():
    (first, *rest) = sites_of(1)
    closed = SiteMeasures(first.site, 1.0, 0.0, reason="an attention mask hides tokens")
    model = Model((closed, *rest), 1)
    assert closed.site not in choose(model.sites, Target("time", 0.3), model.check, 3).specs


@pytest.mark.parametrize(("goal", "value"), [("error", 0.0), ("time", 1.5), ("speed", 0.5), ("error", math.nan)])
def test_a_target_that_means_nothing_is_refused(goal, value):
    with pytest.raises(ValueError):
        Target(goal, value)


def test_the_least_cost_within_an_error_against_every_plan():
    for seed in range(60):
        sites = [each.options() for each in sites_of(seed, 1 + seed % 5)]
        entries = [[(each.dense_cost, 0.0), *((o.cost, o.error) for o in each.options)] for each in sites]
        plans = [tuple(map(sum, zip(*picked, strict=True))) for picked in itertools.product(*entries)]
        for most in (0.0, 0.01, 0.1, 0.5, 3.0):
            plan = plan_within_error(sites, most)
            cheapest = min(cost for cost, error in plans if error <= most)
            assert plan.error <= most * (1 + 1e-12)
            assert plan.cost <= cheapest * (1 + 1e-5), "errors are rounded up to a millionth of the bound"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("target", [Target("error", 0.5), Target("time", 0.5)], ids=["error", "time"])
def test_a_plan_that_breaks_the_model_is_not_taken(target, bad):
    sites = sites_of(3)
    choice = choose(sites, target, lambda specs: Checked(bad, 1.0), 6)
    assert choice.specs == {} and choice.checked is None
    assert all(map(math.isfinite, choice.weights.values()))


def test_half_a_plan_that_breaks_the_model_leaves_the_weights_finite():
    errors = iter([0.1, math.inf, 0.1, math.nan])
    choice = choose(sites_of(3), Target("time", 0.6), lambda specs: Checked(next(errors, 0.1), 1.0), 4)
    assert all(map(math.isfinite, choice.weights.values())) and choice.checked.error == 0.1


def test_all_of_the_time_is_dense_attention():
    choice = choose(sites_of(3), Target("time", 1.0), lambda specs: pytest.fail("nothing to check"), 4)
    assert choice.specs == {} and choice.is_within
