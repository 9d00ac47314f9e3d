"""Plans: site expressions, precedence, the JSON form and its errors."""

import json

import pytest

from linearize.attention.plans import Plan, describe_sites, group_sites, select_sites
from linearize.attention.specs import ClearSpec, DenseSpec, HybridSpec

SITES = tuple(f"double.{i}" for i in range(19)) + tuple(f"single.{i}" for i in range(38))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("all", SITES),
        ("double", SITES[:19]),
        ("single.10-37", SITES[29:]),
        ("double.3", ("double.3",)),
        (" single.0 , double.18 ", ("double.18", "single.0")),
        ("double, all", SITES),
        ("single.36-99", ("single.36", "single.37")),
        ("All", SITES),
        ("Double single.0", (*SITES[:19], "single.0")),
        ("double，single", SITES),
    ],
)
def test_expressions(expression, expected):
    assert select_sites(expression, SITES) == expected


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "cannot read ''"),
        ("double,", "cannot read ''"),
        ("double.x", "cannot read 'double.x'"),
        ("double.1-", "cannot read"),
        ("triple", "'triple' names no site of this model, which has double.0-18, single.0-37"),
        ("double.19", "'double.19' names no site"),
        ("double.9-3", "names no site"),
    ],
)
def test_wrong_expressions_say_what_there_is(expression, words):
    with pytest.raises(ValueError) as error:
        select_sites(expression, SITES)
    assert words in str(error.value)


def test_a_plan_names_its_sites_in_a_bounded_number_of_parts():
    most = ",".join(["double"] * 4096)
    assert select_sites(most, SITES) == SITES[:19]
    data = {"format": "linearize/plan/1", "host": "flux", "sites": {most: {"kind": "dense"}}}
    assert Plan.from_json(data).resolve(SITES) == dict.fromkeys(SITES, DenseSpec())
    words = "sites are named in at most 4096 parts, got 4097; write ranges"
    with pytest.raises(ValueError, match=words):
        select_sites(f"{most},single", SITES)
    with pytest.raises(ValueError, match=words):
        Plan.from_json({**data, "sites": {**data["sites"], "single": {"kind": "dense"}}})


def test_describe_sites_is_an_expression():
    assert describe_sites(SITES) == "double.0-18, single.0-37"
    chosen = ("double.0", "double.2", "double.3", "single.5")
    assert describe_sites(chosen) == "double.0, double.2-3, single.5"
    assert select_sites(describe_sites(chosen), SITES) == chosen
    assert describe_sites(["blocks.0", "vace.0", "blocks.1", "blocks.2", "vace.1"]) == "blocks.0-2, vace.0-1"
    assert describe_sites([]) == ""


def test_later_rules_hold():
    plan = Plan("flux", ClearSpec(8), (("double", DenseSpec()), ("double.3", HybridSpec()), ("all", ClearSpec(4))))
    assert set(plan.resolve(SITES).values()) == {ClearSpec(4)}
    plan = Plan("flux", ClearSpec(8), (("double", DenseSpec()), ("double.3", HybridSpec())))
    specs = plan.resolve(SITES)
    assert specs["double.2"] == DenseSpec() and specs["double.3"] == HybridSpec() and specs["single.0"] == ClearSpec(8)


def test_json_keeps_precedence_of_repeated_expressions():
    plan = Plan("flux", rules=(("double", ClearSpec(8)), ("double.0", ClearSpec(4)), ("double", ClearSpec(2))))
    again = Plan.from_text(json.dumps(plan.to_json()))
    assert again.resolve(SITES) == plan.resolve(SITES)
    assert again.resolve(SITES)["double.0"] == ClearSpec(2)


def test_group_sites_is_the_inverse_of_resolve():
    specs = Plan("flux", ClearSpec(8), (("double.3,single.7-9", DenseSpec()),)).resolve(SITES)
    assert Plan.of_sites("flux", specs) == Plan("flux", rules=group_sites(specs))
    assert Plan.of_sites("flux", specs).resolve(SITES) == specs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "a plan is a JSON object with format 'linearize/plan/1', got 'list'"),
        ('{"format": "linearize/plan/2", "host": "flux"}', "got 'linearize/plan/2'"),
        ('{"format": "linearize/plan/1", "host": "flux", "layers": {}}', "no key 'layers'; its keys are"),
        ('{"format": "linearize/plan/1"}', "names its host"),
        ('{"format": "linearize/plan/1", "host": "flux", "sites": []}', "sites as an object"),
        ('{"format": "linearize/plan/1", "host": "flux", "sites": {"double": {"kind": "clear", "r": 8}}}',
         "in the plan, double: kind clear has no parameter 'r'"),
        ('{"format": "linearize/plan/1", "host": "flux", "default": {"kind": "none"}}',
         "in the plan, default: kind is"),
    ],
)  # fmt: skip
def test_wrong_plans_are_refused_by_name(text, words):
    with pytest.raises(ValueError) as error:
        Plan.from_text(text)
    assert words in str(error.value)


def test_the_spec_of_one_site_is_that_of_all_of_them():
    rules = (("double, single.3-5", DenseSpec()), ("double.3", HybridSpec()), (" single.4 ,double.1-2", ClearSpec(4)))
    for plan in (Plan("flux", ClearSpec(8), rules), Plan("flux", rules=(*rules, ("all", ClearSpec(2)))), Plan("flux")):
        specs = plan.resolve(SITES)
        assert {site: plan.spec_of(site) for site in SITES} == specs


def test_a_plan_for_any_host_becomes_that_of_a_model():
    rules = (("all", ClearSpec(3)),)
    for host in ("auto", "flux"):
        assert Plan(host, rules=rules).for_host("flux", "FLUX.1") == Plan("flux", rules=rules)
    with pytest.raises(ValueError, match=r"the plan is for host wan, this model is flux \(FLUX.1\)"):
        Plan("wan").for_host("flux", "FLUX.1")
