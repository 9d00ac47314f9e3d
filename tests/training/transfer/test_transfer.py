"""Stage 1 on a toy teacher: what it learns, how it resumes, what it refuses."""

import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import Overflowing, ToyTeacher

from linearize.attention.layout import Reason, Segment, TokenLayout
from linearize.attention.planning.report import describe_spec
from linearize.attention.runtime.backends import attention
from linearize.attention.specs import ClearSpec, DenseSpec, FoveatedSpec, HybridSpec, LinearSpec, radius_per_head
from linearize.training.engine.job_folder import JobFolder, JobProblem
from linearize.training.engine.loop import OutOfMemory, Stopped, progress_of, run_stage
from linearize.training.engine.protocols import Draw
from linearize.training.engine.recipe import TransferRecipe
from linearize.training.transfer.transfer import Transfer, call_bytes

CPU = torch.device("cpu")
SITES = ("double.0", "single.0", "single.1")
LINEAR, HYBRID = LinearSpec("hedgehog"), HybridSpec(3, "polynomial")
POOLED = ClearSpec(radius=2, down_factor=2)


def stage(recipe=None, plans=(LINEAR, HYBRID, POOLED), teacher=None, **options):
    recipe = recipe or TransferRecipe(updates=6, learning_rate=0.01, queries=16, held_out=2, warmup=1)
    return Transfer(teacher or ToyTeacher(), [dict.fromkeys(SITES, spec) for spec in plans], recipe, CPU, **options)


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("spec", [
    LINEAR, HYBRID, HybridSpec(2, "hedgehog", stabilizer="lse"), HybridSpec(2, "linfusion", stabilizer="common"),
], ids=describe_spec)  # fmt: skip
@pytest.mark.parametrize("loss", ["value", "squared"])
def test_updates_lower_the_error_on_samples_that_were_held_out(spec, loss, tmp_path):
    trained = stage(TransferRecipe(updates=80, learning_rate=0.03, loss=loss, queries=0, held_out=4, warmup=2), [spec])
    before = trained.measure()
    with JobFolder(tmp_path, {"a": 1}) as job:
        run_stage(trained, job)
    after = trained.measure()
    for site in SITES:
        assert after[site][0] < 0.7 * before[site][0], (site, before, after)


def test_pooling_weights_learn_and_windows_without_any_are_measured_only():
    trained = stage(TransferRecipe(updates=40, queries=0, held_out=2), [POOLED, ClearSpec(radius=2)])
    before = trained.measure()
    for number in range(40):
        trained.update(number)
    after = trained.measure()
    assert sum(after[site][0] for site in SITES) < sum(before[site][0] for site in SITES)
    assert [after[site][1] for site in SITES] == [before[site][1] for site in SITES]
    found = trained.candidates(after)
    assert list(found["double.0"][0].parameters) == ["pool"] and not found["double.0"][1].parameters


FOVEATED = (
    FoveatedSpec(1, 0.1, tile=2), FoveatedSpec(1, 0.0, tile=4, levels=2), FoveatedSpec(1, 0.2, tile=3, order=1),
    radius_per_head((1, 3), FoveatedSpec(top=0.0, tile=2)),
)  # fmt: skip


@pytest.mark.parametrize("spec", FOVEATED, ids=describe_spec)
def test_biases_and_pooling_weights_of_means_learn(spec):
    recipe = TransferRecipe(updates=60, learning_rate=0.05, queries=0, held_out=4, warmup=2)
    runs = [stage(recipe, [spec]) for _ in range(2)]
    before = runs[0].measure()
    for run in runs:
        for number in range(60):
            run.update(number)
    after = runs[0].measure()
    assert sum(after[site][0] for site in SITES) < 0.99 * sum(before[site][0] for site in SITES)
    assert same(runs[0].state(), runs[1].state()), "equal seeds train equally"
    learned = runs[0].candidates(after)["single.0"][0].parameters
    assert {name: tuple(tensor.shape) for name, tensor in learned.items()} == spec.learned_shapes(2)
    assert all(tensor.abs().max() > 1e-3 for tensor in learned.values())


@pytest.mark.parametrize("spec", FOVEATED, ids=describe_spec)
def test_what_means_learn_starts_where_nothing_changes(spec):
    untrained, calls = stage(TransferRecipe(updates=0, held_out=2), [spec]), []
    untrained.teacher.watch(Draw(1, 0.4, 7), calls.append)
    for call in calls:
        plain = attention(call.query, call.key, call.value, call.layout, spec, backend="torch")
        trainer = untrained.trainers[call.site][0]
        assert torch.equal(trainer.output(call), plain) and set(trainer.result()) == set(spec.learned_shapes(2))


@pytest.mark.parametrize(
    "spec",
    [LINEAR, HYBRID, HybridSpec(1), HybridSpec(2, "hedgehog", stabilizer="common"), POOLED, FOVEATED[0]],
    ids=describe_spec,
)
def test_few_queries_are_rows_of_all_of_them(spec):
    trained, calls = stage(plans=[spec]), []
    trained.teacher.watch(Draw(1, 0.4, 7), calls.append)
    trainer, rows = trained.trainers["single.0"][0], torch.tensor([3, 8, 9, 30])
    found, whole = trainer.some_outputs(calls[1], rows), trainer.output(calls[1])
    assert torch.allclose(found, whole[:, :, rows], atol=1e-6)


def test_score_loss_fits_the_weights():
    trained = stage(TransferRecipe(updates=120, learning_rate=0.03, loss="score", held_out=2), [HYBRID],
                    teacher=ToyTeacher(sharpness=0.7))  # fmt: skip
    losses = [trained.update(number)["loss"] for number in range(120)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize("options", [{}, {"replay": 3, "repeats": 2}, {"repeats": 2}], ids=str)
def test_a_stopped_run_goes_on_bit_by_bit(options, tmp_path):
    recipe = TransferRecipe(updates=11, queries=16, held_out=2, **options)
    whole = stage(recipe)
    for number in range(11):
        whole.update(number)

    def stop(done, total, losses):
        if done == 5:
            raise Stopped

    first = stage(recipe)
    with JobFolder(tmp_path, recipe.to_json()) as job:
        assert run_stage(first, job, stop).done == 5
        resumed = stage(recipe)
        progress = run_stage(resumed, job)
    assert progress.done == 11 and len(progress.history["loss"]) == 11
    assert same(resumed.state(), whole.state())


def test_what_is_kept_is_used_in_turns_and_survives_a_shortage_of_memory():
    """Four passes, each used twice in the eight updates of a round; a failure while they are made repeats them all."""
    seen = []

    class Scarce(ToyTeacher):
        failures = 1

        def watch(self, draw, observe):
            if self.failures and self.forwards == 2:
                self.failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().watch(draw, observe)

    run = stage(TransferRecipe(updates=8, replay=4, repeats=2, held_out=1), [LINEAR], teacher=Scarce())
    learn = run.trainers["single.0"][0].backward
    run.trainers["single.0"][0].backward = lambda call, rows: (seen.append(float(call.query.sum())), learn(call, rows))[
        1
    ]
    with pytest.raises(torch.OutOfMemoryError):
        run.update(0)
    for number in range(8):
        run.update(number)
    assert len(set(seen)) == 4 and all(seen.count(value) == 2 for value in seen)
    assert len(set(seen[:4])) == 4


@pytest.mark.parametrize("stop", [None, 3], ids=["whole", "stopped"])
def test_a_pass_is_used_as_often_as_asked_where_memory_holds_few(stop, tmp_path):
    """Of five passes a round, memory holds two: rounds are shorter, and no pass is used more than twice."""
    seen, plain = [], stage(TransferRecipe(updates=12, queries=16), [LINEAR])
    calls = []
    plain.teacher.watch(plain._draw(0), calls.append)
    size = sum(call_bytes(call) for call in calls)
    recipe = TransferRecipe(updates=12, queries=16, replay=5, repeats=2, replay_bytes=2 * size + 1, held_out=1)

    def watched():
        run = stage(recipe, [LINEAR])
        learn = run.trainers["single.0"][0].backward

        def backward(call, rows):
            seen.append(float(call.query.sum()))
            return learn(call, rows)

        run.trainers["single.0"][0].backward = backward
        return run

    def watch(done, total, losses):
        if done == stop:
            raise Stopped

    with JobFolder(tmp_path, recipe.to_json()) as job:
        run_stage(watched(), job, watch)
        run = watched()
        run_stage(run, job)
    assert len(seen) == 12 and len(set(seen)) == 6 and all(seen.count(value) == 2 for value in seen)
    assert [len(set(seen[first : first + 4])) for first in (0, 4, 8)] == [2, 2, 2]
    assert run.notes == ["of the 5 passes to keep, 2 at a time fit into 0.1 MiB of host memory"]


class Killed(BaseException):
    pass


def test_fifty_kills_change_nothing(tmp_path):
    """An exception at any attention call of any forward, as an interrupt raises it, is repeated from the last save."""
    recipe = TransferRecipe(updates=40, queries=8, held_out=1)
    whole = stage(recipe, [LINEAR])
    for number in range(recipe.updates):
        whole.update(number)
    dice, kills = random.Random(5), 0
    with JobFolder(tmp_path, recipe.to_json()) as job:
        while True:
            run = stage(recipe, [LINEAR], teacher=Deadly(dice.randint(1, 5)))
            try:
                run_stage(run, job)
                break
            except Killed:
                kills += 1
    assert kills >= 50
    assert same(run.state(), whole.state())


class Deadly(ToyTeacher):
    def __init__(self, lives):
        super().__init__()
        self.lives = lives

    def watch(self, draw, observe):
        def mortal(call):
            self.lives -= 1
            if self.lives < 0:
                raise Killed
            observe(call)

        return super().watch(draw, mortal)


def test_a_process_that_is_killed_leaves_a_job_that_goes_on(tmp_path):
    """SIGKILL at a random moment, five times, then to the end: equal to a run that nothing disturbed."""
    script = Path(__file__).parents[1] / "run_toy.py"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    dice = random.Random(1)
    for _ in range(5):
        child = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, env=environment)
        for _ in range(dice.randint(1, 12)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=environment, stdout=subprocess.DEVNULL)
    import run_toy

    undisturbed = run_toy.stage()
    for number in range(undisturbed.num_updates):
        undisturbed.update(number)
    with JobFolder(tmp_path, run_toy.RECIPE.to_json()) as job:
        tensors, values = job.result()
    assert values["done"] == undisturbed.num_updates and same(tensors, undisturbed.state())


def test_a_call_that_cannot_be_learned_from_is_named():
    class Masked(ToyTeacher):
        def watch(self, draw, observe):
            mask = torch.zeros(1, dtype=torch.bool)
            return super().watch(draw, lambda call: observe(replace(call, mask=mask)))

    with pytest.raises(ValueError, match=r"double\.0 cannot be distilled here: an attention mask hides tokens"):
        stage(teacher=Masked()).update(0)

    class Unknown(ToyTeacher):
        def watch(self, draw, observe):
            return super().watch(draw, lambda c: observe(replace(c, layout=Reason("arguments", "no grid is known"))))

    with pytest.raises(ValueError, match="no grid is known"):
        stage(teacher=Unknown()).update(0)

    class Textual(ToyTeacher):
        def watch(self, draw, observe):
            text = TokenLayout((Segment("text", self.layout.num_tokens),))
            return super().watch(draw, lambda call: observe(replace(call, layout=text)))

    with pytest.raises(ValueError, match="no token lies on a grid"):
        stage(teacher=Textual()).update(0)

    class Silent(ToyTeacher):
        def watch(self, draw, observe):
            return super().watch(draw, lambda call: None)

    with pytest.raises(ValueError, match="ran without calling double"):
        stage(teacher=Silent()).update(0)


@pytest.mark.parametrize("options", [{}, {"replay": 2, "repeats": 2}], ids=str)
@pytest.mark.parametrize("name, words", [
    ("output", "single.0: the model's own attention is infinite or NaN at update 4; load the model in bfloat16 or"),
    ("query", r"single.0, linear( feature_map hedgehog)?: the loss is nan at update 4; lower the learning rate, or"),
])  # fmt: skip
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_candidate(name, words, options, tmp_path):
    recipe = TransferRecipe(updates=12, queries=0, held_out=1, warmup=0, **options)
    first = 2 if options else 3  # a round of four updates makes two forwards at once
    words = words.replace("update 4", r"update \d") if options else words
    run, whole = stage(recipe, [LINEAR], teacher=Overflowing(name, first)), stage(recipe, [LINEAR])
    with JobFolder(tmp_path, recipe.to_json()) as job:
        progress = run_stage(run, job)
        done = progress_of(job).done
    assert re.match(words, progress.problem), progress.problem
    assert 3 <= done < 12 and progress.done == done
    for number in range(done):
        whole.update(number)
    assert same(run.state(), whole.state())


def test_where_nothing_was_learned_a_loss_that_is_not_finite_is_an_error(tmp_path):
    with JobFolder(tmp_path, {"a": 1}) as job, pytest.raises(ValueError, match="infinite or NaN at update 1; load"):
        run_stage(stage(TransferRecipe(updates=3, queries=0), [LINEAR], teacher=Overflowing("output", 0)), job)


def test_a_gradient_that_is_not_finite_takes_no_step():
    run = stage(plans=[LINEAR, HYBRID])
    run.update(0)
    spoilt, other = run.trainers["single.0"]
    before = [value.detach().clone() for value in (*spoilt.parameters(), *other.parameters())]
    next(spoilt.parameters()).register_hook(lambda grad: grad * float("nan"))
    run.update(1)
    kept = [value.detach() for value in (*spoilt.parameters(), *other.parameters())]
    number = len(list(spoilt.parameters()))
    assert all(map(torch.equal, before[:number], kept[:number]))
    assert not any(map(torch.equal, before[number:], kept[number:])), "the other candidate learned"


def test_plans_with_nothing_to_distil_are_refused():
    with pytest.raises(ValueError, match="every site dense"):
        stage(plans=[DenseSpec()])
    with pytest.raises(ValueError, match="loss is one of value, squared, score"):
        TransferRecipe(loss="mse")
    with pytest.raises(ValueError, match="feature_dim"):
        stage(plans=[LinearSpec("hedgehog", 3)])


def test_two_runs_on_one_folder_are_refused(tmp_path):
    with JobFolder(tmp_path, {"a": 1}) as job:
        written = (job.path / "job.json").stat()
        with pytest.raises(JobProblem, match="another run is working on this job"):
            JobFolder(tmp_path, {"a": 1}).__enter__()
        assert (job.path / "job.json").stat() == written, "who was refused wrote nothing"


def test_a_folder_that_cannot_be_written_is_a_sentence_and_is_not_locked(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(JobProblem, match="cannot be written: No space left on device"):
        disk.setattr(os, "fsync", full)
        JobFolder(tmp_path, {"a": 1}).__enter__()
    with JobFolder(tmp_path, {"a": 1}) as job:
        assert (job.path / "job.json").is_file()


def test_a_full_disk_is_a_sentence_and_the_state_before_stays(tmp_path, monkeypatch):
    run = stage()
    with JobFolder(tmp_path, {"a": 1}) as job:
        job.save_state(run.state(), {"done": 3, "history": [], "notes": []})

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("linearize.attention.students.tensor_file._write", full)
        with pytest.raises(ValueError, match="No space left on device"):
            job.save_state(run.state(), {"done": 4, "history": [], "notes": []})
        assert job.state()[1]["done"] == 3
        assert sorted(path.name for path in job.path.iterdir()) == ["job.json", "lock", "state.safetensors"]


def test_when_memory_runs_out_fewer_queries_are_trained_on(tmp_path):
    class Heavy(ToyTeacher):
        failures = 2

        def watch(self, draw, observe):
            if self.failures:
                self.failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().watch(draw, observe)

    run = stage(TransferRecipe(updates=2, queries=1024, held_out=1), [LINEAR], teacher=Heavy())
    with JobFolder(tmp_path, {"a": 1}) as job:
        progress = run_stage(run, job)
    assert progress.done == 2
    assert progress.notes == ["memory ran out, so 512 queries of each call are trained on",
                              "memory ran out, so 256 queries of each call are trained on"]  # fmt: skip
    hopeless = Heavy()
    hopeless.failures = 1000
    with JobFolder(tmp_path, {"a": 2}) as job, pytest.raises(OutOfMemory, match="train at a smaller size"):
        run_stage(stage(teacher=hopeless), job)


def test_backends_give_one_curve(interpreter):
    """Reference, PyTorch and Triton's interpreter: the same losses for 50 updates."""
    curves = {}
    for backend in ("reference", "torch", "triton"):
        recipe = TransferRecipe(updates=50, learning_rate=0.003, held_out=1, backend=backend)
        trained = stage(recipe, [HybridSpec(3, "hedgehog")], teacher=ToyTeacher(3, 4))
        curves[backend] = torch.tensor([trained.update(number)["loss"] for number in range(50)])
    for backend in ("torch", "triton"):
        assert torch.allclose(curves[backend], curves["reference"], rtol=2e-3), backend
    assert curves["reference"][-1] < 0.8 * curves["reference"][0]
