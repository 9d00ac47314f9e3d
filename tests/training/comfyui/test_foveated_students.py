"""Foveated attention through the distillation nodes on a tiny FLUX: learned, chosen, fine-tuned, saved and loaded."""

from pathlib import Path

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture
def folder(comfy):
    """models/linearize; what a test puts there is removed."""
    import folder_paths

    path = Path(folder_paths.get_folder_paths("linearize")[0])
    path.mkdir(parents=True, exist_ok=True)
    before = set(path.iterdir())
    yield path
    for made in set(path.iterdir()) - before:
        made.unlink()


@pytest.fixture
def bench(lab):
    """Nodes by id with the teacher as `model` where they take one, and plans for Distill Attention."""
    plans, studio = lab.module("attention.plans"), lab.models["flux"]

    class Bench:
        specs, sample, model = lab.specs, staticmethod(studio.sample), studio.model
        ran = staticmethod(studio.ran)
        spec = lab.specs.FoveatedSpec(1, 0.1, tile=2)

        @staticmethod
        def run(node, **inputs):
            with torch.inference_mode():
                return lab.node(f"Linearize{node}")(**inputs).args

        def plan(self, spec):
            return plans.Plan("flux", spec)

        def distil(self, *kinds, **inputs):
            given = {f"plan{number}": self.plan(spec) for number, spec in enumerate(kinds)}
            more = {"updates": 12, "learning_rate": 0.05, "held_out": 2, "output_draws": 0, "repeats": 2, **inputs}
            return self.run("Transfer", model=self.model, samples=lab.samples("flux"), plans=given, **more)

    return Bench()


def error(student, number=0):
    return sum(candidates[number].error for candidates in student.sites.values())


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_no_updates_change_nothing_and_some_lower_the_error(bench):
    fresh, _ = bench.distil(bench.spec, updates=0)
    shapes = bench.spec.learned_shapes(fresh.sites["single.0"][0].parameters["bias"].shape[0])
    for (candidate,) in fresh.sites.values():
        assert {name: tuple(t.shape) for name, t in candidate.parameters.items()} == shapes
    (untrained,) = bench.run("Apply", model=bench.model, attention=bench.plan(bench.spec))
    (with_fresh,) = bench.run("Apply", model=bench.model, attention=fresh)
    assert torch.equal(bench.sample(with_fresh), bench.sample(untrained))
    student, losses = bench.distil(bench.spec)
    assert error(student) < 0.98 * error(fresh) and len(losses["loss"]) == 12
    (learned,) = bench.run("Apply", model=bench.model, attention=student)
    assert (bench.sample(learned) - bench.sample(untrained)).abs().max() > 1e-6
    assert set(bench.ran(learned).values()) == {("foveated", "torch")}


def test_a_budget_chooses_and_what_is_saved_loads_bit_for_bit(bench, lab, folder):
    """Several candidates with levels, matrices behind them; the picture of errors and the report take them too."""
    far = bench.specs.FoveatedSpec(1, 0.0, tile=4, levels=2)
    student, _ = bench.distil(bench.spec, far, bench.specs.ClearSpec(1), output_draws=2)
    assert bench.run("SiteErrors", student=student)[0].ndim == 4
    chosen, plan, text = bench.run(
        "BudgetPlan", model=bench.model, student=student, budget=0.8, width=512, height=512, keep_dense="double.0"
    )
    kinds = {site: candidate.spec.kind for site, (candidate,) in chosen.sites.items()}
    assert "foveated" in kinds.values() and "double.0" not in kinds, text
    (saved,) = bench.run("SaveStudent", student=chosen, name="seen")
    assert "foveated" in saved
    loaded, again = bench.run("LoadStudent", model=bench.model, student="seen_00001_.safetensors")
    for site, (candidate,) in chosen.sites.items():
        (other,) = again.sites[site]
        assert other.spec == candidate.spec and same(other.parameters, candidate.parameters)
    (applied,) = bench.run("Apply", model=bench.model, attention=chosen)
    assert torch.equal(bench.sample(loaded), bench.sample(applied))
    assert {site: kind for site, (kind, _) in bench.ran(loaded).items() if kind != "dense"} == kinds
    report = bench.run("Report", model=loaded, width=512, height=512)[0]
    assert "foveated top" in report and lab.module("attention.hub.model_card").describe_student(again.student())


def test_fine_tuning_goes_on_with_what_means_learned(bench, lab):
    split = bench.specs.radius_per_head((1, 2), bench.spec)
    student, _ = bench.distil(split, updates=4)
    tuned, _ = lab.finetune(bench.model, student, lab.samples("flux"), updates=6, seed=11, map_rate=2e-2)
    facts = tuned.recipe["finetune"]
    assert facts["error_after"] < facts["error_before"] and tuned.deltas
    for site, (candidate,) in tuned.sites.items():
        before = student.sites[site][0].parameters
        assert candidate.spec == split and candidate.parameters.keys() == before.keys() == {"bias", "pool_logits"}
        assert not any(torch.equal(candidate.parameters[name], before[name]) for name in before)
    (applied,) = bench.run("Apply", model=bench.model, attention=tuned)
    assert bench.sample(applied).isfinite().all() and set(bench.ran(applied)) == set(SITES)
