"""Whole jobs of stage 1 on the toy: what is handed on and said where a run went wrong, or had nothing to learn."""

from types import SimpleNamespace

import pytest
import torch
from toy import Overflowing, ToyTeacher

from linearize.attention.plans import Plan
from linearize.attention.specs import ClearSpec, LinearSpec
from linearize.attention.students.file import load_student, save_student
from linearize.training.engine.job_folder import read_values
from linearize.training.engine.recipe import TransferRecipe
from linearize.training.engine.results import unpack
from linearize.training.jobs.run_job import Job, run
from linearize.training.jobs.watch import Watch

SAMPLES: SimpleNamespace = SimpleNamespace(entries=[None] * 6, about=SimpleNamespace(base_model="toy"), digest="six")
LINEAR = LinearSpec("hedgehog")


class ToyModel:
    """`linearize.training.engine.protocols.Model`."""

    fingerprint, device, digest, earlier_digests = torch.zeros(256), torch.device("cpu"), "toy", ()

    def __init__(self, teacher):
        self.teacher, self.host, self.sites = teacher, teacher.host, teacher.sites

    def as_teacher(self, samples, work):
        return work(self.teacher)


class Kept(Watch):
    """Reads the result that was saved."""

    def end(self, result, file):
        self.saved = read_values(file) if file.exists() else None


@pytest.fixture
def transfer(tmp_path):
    """A whole job of stage 1; the job of equal settings is the same one."""

    def transfer(teacher, specs=(LINEAR,), **settings):
        recipe = TransferRecipe(**{"updates": 4, "queries": 0, "held_out": 2, "output_draws": 0, **settings})
        job = Job(tmp_path, recipe, tuple(Plan("flux", spec) for spec in specs))
        watch = Kept()
        return run(job, ToyModel(teacher), SAMPLES, watch), watch.saved

    return transfer


@pytest.mark.parametrize("broken", [range(1), range(1, 4)], ids=["after", "throughout"])
def test_a_site_that_cannot_be_measured_is_named_and_the_student_is_saved(transfer, broken, tmp_path):
    """Infinite outputs in all measurements, or in those after the updates (two passes, then four updates)."""
    first = 6 if broken == range(1) else 0
    updates = 4 if first else 0
    result, saved = transfer(Overflowing("output", first), updates=updates)
    assert "nan" not in result.text
    assert "could not be measured, because values there are infinite or NaN: single.0" in result.text
    facts = result.candidates.recipe["transfer"]
    measured = [each.error for site, (each,) in result.candidates.sites.items() if site != "single.0"]
    assert facts["error_after"] == pytest.approx(sum(measured) / 2)
    save_student(tmp_path / "student.safetensors", unpack(*saved).candidates.student())
    student = load_student(tmp_path / "student.safetensors")
    assert student.site_errors.keys() == {"double.0", "single.1"} and student.recipe["transfer"] == facts


def test_where_no_site_can_be_measured_the_student_is_saved_without_an_error(transfer, tmp_path):
    class Hot(ToyTeacher):
        def watch(self, draw, observe):
            return super().watch(draw, lambda call: (call.output.fill_(float("inf")), observe(call)))

    result, _ = transfer(Hot(), updates=0)
    assert "linear feature_map hedgehog: not measured" in result.text
    assert "infinite or NaN: double.0, single.0-1" in result.text
    save_student(tmp_path / "student.safetensors", result.candidates.student())
    facts = load_student(tmp_path / "student.safetensors").recipe["transfer"]
    assert facts["error_before"] is None and facts["error_after"] is None


def test_a_loss_that_is_not_finite_hands_on_what_was_learned_before(transfer):
    """The draws repeat, so that it would fail at the same update for ever: the job is over, with its matrices."""
    teacher = Overflowing("query", 5)  # two passes measure
    result, saved = transfer(teacher, updates=40, output_draws=16)
    assert "ended after 3 of 40 updates: single.0, linear feature_map hedgehog: the loss is nan at update 4; lower" in (
        result.text
    )
    assert "cancelled" not in result.text and len(result.history["loss"]) == 3
    facts = result.candidates.recipe["transfer"]
    assert facts["updates_done"] == 3 and "the loss is nan at update 4" in facts["notes"][-1]
    (found,) = result.candidates.sites["double.0"]
    assert "output.weight" in found.parameters, "it is over, so the matrices are made"
    assert saved is not None and unpack(*saved).text == result.text


def test_plans_with_nothing_to_learn_take_no_updates(transfer):
    """Unpooled windows: passes that measure and make matrices, and none that teach."""
    teacher = ToyTeacher()
    result, saved = transfer(teacher, [ClearSpec(radius=2)], updates=1000, output_draws=3)
    assert teacher.forwards == 2 * 2 + 3 + 2
    assert result.history == {} and result.candidates.recipe["transfer"]["updates_done"] == 0
    assert "cancelled" not in result.text and saved is not None


def test_what_memory_holds_too_few_passes_of_is_said(transfer):
    result, _ = transfer(ToyTeacher(), updates=2, replay=3, replay_bytes=0)
    assert "of the 3 passes to keep, 1 at a time fits into 0.0 MiB of host memory" in result.text
    assert "of the 3 passes" in result.candidates.recipe["transfer"]["notes"][0]
