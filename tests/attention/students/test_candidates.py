"""Students in memory: choosing among candidates, what a file gets of them, and that nothing is lost on the way back."""

import math
from dataclasses import replace

import pytest
import torch

from linearize.attention.hosts.base import numbered_sites
from linearize.attention.plans import Plan
from linearize.attention.specs import ClearSpec, DenseSpec
from linearize.attention.students.candidates import IN_MEMORY, Candidate, Candidates, decided
from linearize.attention.students.file import StudentFile, load_student, save_student
from linearize.attention.students.fit import check_student

SITES = numbered_sites("single", 4, 2, 8)
POOL = torch.full((2, 2), 0.25)
WIDE, NARROW = ClearSpec(9), ClearSpec(2, down_factor=2)
DELTA = {"diffusion_model.single_blocks.0.linear1.diff": torch.ones(2)}


def several(**fields):
    """Return two candidates at single.0, one at single.1 and single.10, none elsewhere."""
    sites = {
        "single.0": (Candidate(WIDE, 0.5), Candidate(NARROW, 0.25, {"pool": POOL})),
        "single.1": (Candidate(NARROW, 0.1, {"pool": POOL * 2}),),
        "single.10": (Candidate(NARROW, 0.2, {"pool": POOL * 3}),),
    }
    return Candidates("flux", sites, **{"base_model": "tiny", "licence": "mit", "recipe": {"a": 1}, **fields})


def test_the_lowest_error_is_taken_unless_one_is_chosen():
    student = several()
    assert not student.is_decided and student.best() == {"single.0": 1, "single.1": 0, "single.10": 0}
    file = student.student()
    assert file.plan.spec_of("single.0") == NARROW and file.plan.spec_of("single.5") == DenseSpec()
    assert set(file.parameters) == {"single.0.pool", "single.1.pool", "single.10.pool"}
    assert file.site_errors == {"single.0": 0.25, "single.1": 0.1, "single.10": 0.2} and file.origin == IN_MEMORY
    other = student.student({"single.0": 0, "single.10": 0})
    assert other.plan.spec_of("single.0") == WIDE and other.plan.spec_of("single.1") == DenseSpec()
    assert set(other.parameters) == {"single.10.pool"} and other.site_errors == {"single.0": 0.5, "single.10": 0.2}
    assert (other.base_model, other.licence, other.recipe) == ("tiny", "mit", {"a": 1})


def test_an_error_that_nobody_measured_is_worst_and_not_written():
    student = Candidates("flux", {"single.0": (Candidate(WIDE, math.nan), Candidate(NARROW, 9.0))})
    assert student.best() == {"single.0": 1}
    assert student.student({"single.0": 0}).site_errors == {}


@pytest.mark.parametrize("choice", [{"single.0": 2}, {"single.0": -1}, {"single.3": 0}])
def test_a_choice_of_what_is_not_there(choice):
    with pytest.raises(ValueError, match=r"single\.\d has \d candidates, none is number -?\d"):
        several().chosen(choice)


def test_changed_weights_belong_to_all_sites_together():
    sites = {"single.0": (Candidate(WIDE, 0.5),), "single.1": (Candidate(WIDE, 0.5),)}
    student = Candidates("flux", sites, deltas=DELTA)
    assert set(student.chosen({"single.0": 0, "single.1": 0}).deltas) == set(DELTA)
    with pytest.raises(ValueError, match=r"all sites together, so single\.1 cannot be left out"):
        student.chosen({"single.0": 0})
    with pytest.raises(ValueError, match=r"single\.0 has 2 candidates, a student with changed weights has one each"):
        several(deltas=DELTA)
    with pytest.raises(ValueError, match=r"single\.0 has 0 candidates"):
        Candidates("flux", {"single.0": ()})


def test_what_was_saved_comes_back_as_candidates(tmp_path):
    one = several(role="high", pair_id="p", fingerprint=torch.rand(256), draw=1).chosen({"single.0": 1, "single.1": 0})
    save_student(tmp_path / "s.safetensors", one.student())
    loaded = load_student(tmp_path / "s.safetensors")
    back = Candidates.of_student(loaded, check_student(loaded, "flux", SITES))
    assert list(back.sites) == ["single.0", "single.1"] and back.is_decided
    for site, (candidate,) in one.sites.items():
        (found,) = back.sites[site]
        assert (found.spec, found.error) == (candidate.spec, candidate.error)
        assert found.parameters.keys() == candidate.parameters.keys()
        assert all(torch.equal(found.parameters[name], candidate.parameters[name]) for name in found.parameters)
    assert back.origin == IN_MEMORY
    named = Candidates.of_student(
        replace(loaded, origin="s.safetensors"), loaded.plan.resolve(["single.0", "single.1"])
    )
    assert named.student().origin == "s.safetensors" and named.chosen({"single.0": 0}).origin == IN_MEMORY
    for field in ("host", "base_model", "licence", "role", "pair_id", "recipe"):
        assert getattr(back, field) == getattr(one, field)
    assert torch.equal(back.fingerprint, one.fingerprint)
    first = replace(loaded, draw=1)
    assert one.student().draw == Candidates.of_student(first, check_student(first, "flux", SITES)).draw == 1


def test_a_file_without_errors_comes_back_as_not_measured():
    file = StudentFile(host="flux", plan=Plan("flux", WIDE))
    back = Candidates.of_student(file, check_student(file, "flux", SITES))
    assert all(math.isnan(found[0].error) for found in back.sites.values()) and len(back.sites) == 4


def test_who_chose_is_said():
    one, note = decided(several())
    assert (
        note == "of 1 site with several candidates the one of lowest error was taken; Budget Plan chooses by cost too"
    )
    assert one.is_decided and one.student().plan.spec_of("single.0") == NARROW
    assert decided(one) == (one, "")
