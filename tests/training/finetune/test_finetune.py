"""Stages 2 and 3 on a toy model: gradients, what it learns, how it resumes, what it refuses."""

import hashlib
import re
from dataclasses import replace

import pytest
import torch
from toy_trainee import ToyTrainee

from linearize.attention.hosts.wan import WanHost
from linearize.attention.specs import ClearSpec, DenseSpec, FoveatedSpec, HybridSpec, LinearSpec, MappedSpec
from linearize.attention.students.candidates import Candidate, Candidates, decided
from linearize.attention.students.file import load_student, save_student
from linearize.attention.students.learned import new_maps
from linearize.attention.students.tensor_values import content_sha256
from linearize.training.engine.job_folder import JobFolder
from linearize.training.engine.loop import OutOfMemory, Progress, Stopped, run_stage
from linearize.training.engine.losses import residual_loss
from linearize.training.engine.optimizers import optimizer_state, restore_optimizer
from linearize.training.engine.protocols import Draw
from linearize.training.engine.recipe import NOISE_LEVELS, PRESETS, FinetuneRecipe
from linearize.training.engine.results import Finished, pack, student_digest, unpack
from linearize.training.engine.schedule import generator, training_draw
from linearize.training.finetune.deltas import FullRank, LowRank
from linearize.training.finetune.finetune import Errors, Finetune

CPU = torch.device("cpu")
LINEAR, HYBRID, POOLED, WINDOW, FOVEATED = (
    LinearSpec("hedgehog"), HybridSpec(3, "polynomial"), ClearSpec(radius=2, down_factor=2), ClearSpec(radius=2),
    FoveatedSpec(1, 0.1, tile=2),
)  # fmt: skip
QUICK = FinetuneRecipe(
    block_updates=3, updates=3, rank=2, map_rate=1e-2, delta_rate=3e-3, accumulation=1, warmup=1, held_out=2, ema=0.9,
    checkpointing=False,
)  # fmt: skip


def student(spec, sites=None, deltas=None):
    found = {}
    for site in ToyTrainee().sites:
        parameters = {}
        if isinstance(spec, MappedSpec):
            for part, each in zip(("phi_q", "phi_k"), new_maps(spec, site.num_heads, site.head_dim), strict=True):
                parameters |= {f"{part}.{name}": value.detach() for name, value in each.named_parameters()}
        if sites is None or site.id in sites:
            found[site.id] = (Candidate(spec, 1.0, parameters),)
    return Candidates("flux", found, deltas=deltas or {})


def stage(spec=LINEAR, recipe=QUICK, trainee=None, **options):
    return Finetune(trainee or ToyTrainee(), student(spec, **options), recipe, CPU)


def train(found, count):
    return [found.update(number) for number in range(count)]


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def hash_of(module):
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Precise(ToyTrainee):
    """In float64, for finite differences."""

    def __init__(self):
        super().__init__()
        self.module.double()

    def parts(self, draw):
        return tuple(each.double() for each in super().parts(draw))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("spec", [LINEAR, HYBRID, POOLED, FOVEATED], ids=lambda spec: spec.kind)
def test_gradients_reach_everything_that_learns(spec, checkpointing):
    """Of the velocity and of observed attention outputs, by finite differences along a random direction."""
    trainee = Precise()
    learning = stage(spec, trainee=trainee).trainables.double()
    trainee.checkpointing = checkpointing
    parameters = learning.trained()
    with torch.no_grad():
        for name, each in parameters.items():
            each += torch.randn(each.shape, generator=generator(name), dtype=each.dtype) * 0.05

    def loss():
        seen = []
        velocity = trainee.predict(Draw(0, 0.5, 3), lambda call: seen.append(call.output))
        assert len(seen) == 3
        weighed = [(x * torch.randn(x.shape, generator=generator(i))).sum() for i, x in enumerate((velocity, *seen))]
        return torch.stack(weighed).sum()

    loss().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in parameters.values())
    directions = {name: torch.randn(each.shape, generator=generator(1, name)) for name, each in parameters.items()}
    slope, losses = sum(float((each.grad * directions[name]).sum()) for name, each in parameters.items()), []
    with torch.no_grad():
        for sign in (1e-6, -2e-6):
            for name, each in parameters.items():
                each += sign * directions[name]
            losses.append(float(loss()))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("spec", [LINEAR, HYBRID, POOLED, WINDOW, FOVEATED], ids=lambda spec: f"{spec.kind}")
def test_updates_lower_the_held_out_error_and_the_base_stays(spec):
    recipe = replace(QUICK, block_updates=15, updates=25, rank=4, held_out=4, accumulation=2)
    trainee = ToyTrainee()
    before = hash_of(trainee.module)
    draw = Draw(1, 0.4, 9)
    teacher = trainee.watch(draw, lambda call: None)
    found = stage(spec, recipe, trainee)
    losses = train(found, 40)
    kept, text = found.result(Progress(40, {}, []))
    facts = kept.recipe["finetune"]
    assert facts["error_after"] < 0.8 * facts["error_before"], text
    assert set(losses[0]) == {"loss"} and set(losses[-1]) == {"loss", "prediction", "attention"}
    assert hash_of(trainee.module) == before
    assert torch.equal(trainee.watch(draw, lambda call: None), teacher), "with the student attached"
    assert (trainee.predict(draw) - teacher).abs().max() > 0
    found.close()
    assert torch.equal(trainee.watch(draw, lambda call: None), teacher)
    assert set(kept.sites) == {"double.0", "single.0", "single.1"} and kept.deltas
    assert all(0 < each.error < 1 for (each,) in kept.sites.values())


@pytest.mark.parametrize("spec", [HYBRID, FOVEATED], ids=lambda spec: spec.kind)
def test_what_comes_out_is_what_was_measured(spec):
    """A student made of the result misses as much as the result says."""
    found = stage(spec, replace(QUICK, block_updates=8, updates=8))
    train(found, 16)
    kept, _ = found.result(Progress(16, {}, []))
    again = Finetune(ToyTrainee(), kept, QUICK, CPU)
    measured = again.measure()
    assert measured.velocity == pytest.approx(kept.recipe["finetune"]["error_after"], rel=1e-4)
    assert {site: each.error for site, (each,) in kept.sites.items()} == pytest.approx(measured.sites, rel=1e-4)
    tensors, values = pack(Finished(replace(kept, draw=1), {"loss": [1.0]}, "text"))
    back = unpack(tensors, values).candidates
    assert back.draw == 1 and unpack(*pack(Finished(kept, {}, ""))).candidates.draw == 2
    assert unpack(tensors, {k: v for k, v in values.items() if k != "draw"}).candidates.draw == 1
    assert same(dict(back.deltas), dict(kept.deltas)) and back.recipe == kept.recipe
    assert same(dict(back.sites["single.0"][0].parameters), dict(kept.sites["single.0"][0].parameters))
    assert all(tensor.any() for tensor in kept.sites["single.0"][0].parameters.values())


@pytest.mark.parametrize("feature_map", ["hedgehog", "favor"])
def test_jobs_of_earlier_versions_are_found_by_their_student(feature_map):
    """They were named after all that a student has but its draw, which was the first."""

    def drawn(draw):
        parts = {"phi_q.weight": torch.ones(2)} if feature_map == "hedgehog" else {}
        return Candidates("toy", {"single.0": (Candidate(LinearSpec(feature_map), 0.5, parts),)}, draw=draw)

    tensors, values = pack(Finished(drawn(1), {}, ""))
    earlier = content_sha256(tensors, {name: value for name, value in values.items() if name != "draw"})
    assert student_digest(drawn(1)) == earlier
    assert (student_digest(drawn(2)) == earlier) == (feature_map == "hedgehog"), "nothing of that is drawn"


def test_a_start_without_changes_is_the_student_that_came_in():
    found = stage(LINEAR)
    trainee, draw = ToyTrainee(), Draw(0, 0.5, 1)
    plain = Finetune(trainee, student(LINEAR), replace(QUICK, trainables="maps"), CPU)
    assert not plain.trainables.deltas
    assert torch.equal(found.trainee.predict(draw), trainee.predict(draw))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_weigh_their_losses(preset):
    recipe = replace(QUICK, block_updates=0, **PRESETS[preset])
    (losses,) = train(stage(recipe=recipe), 1)
    names = [name for name in ("flow", "prediction", "attention") if name in losses]
    weighed = sum(losses[name] * getattr(recipe, name) for name in names)
    assert losses["loss"] == pytest.approx(weighed, rel=1e-5)
    assert ("flow" in losses) == bool(recipe.flow) and ("attention" in losses) == bool(recipe.attention)


def test_blocks_are_judged_by_what_they_add():
    x, added = torch.randn(1, 5, 4, generator=generator(1)), torch.randn(1, 5, 4, generator=generator(2)) * 0.1
    text = torch.randn(1, 3, 4, generator=generator(3))
    missing = x + 0.5 * added
    inputs = (torch.randn(1, 5, 4, generator=generator(4)), x, text)
    assert float(residual_loss((missing,), (x + added,), inputs)) == pytest.approx(0.25, rel=1e-4)
    both = residual_loss((missing, text + 1.0), (x + added, text + 1.0), inputs)
    assert float(both) == pytest.approx(0.125, rel=1e-4), "streams count alike"
    alone = residual_loss((missing,), (x + added,), (text,))
    assert float(alone) == pytest.approx(float((0.5 * added).square().mean() / (x + added).square().mean()), rel=1e-4)


@pytest.mark.parametrize("stop", [1, 3, 4], ids=["in blocks", "between", "end to end"])
@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "checkpointing": True}, {"trainables": "full"}], ids=str)
def test_a_stopped_run_goes_on_bit_by_bit(stop, options, tmp_path):
    recipe = replace(QUICK, **options)
    whole = stage(recipe=recipe)
    train(whole, 6)

    def end(done, total, losses):
        if done == stop:
            raise Stopped

    with JobFolder(tmp_path, recipe.to_json()) as job:
        assert run_stage(stage(recipe=recipe), job, end).done == stop
        resumed = stage(recipe=recipe)
        progress = run_stage(resumed, job)
    assert progress.done == 6 and len(progress.history["loss"]) == 6
    assert same(resumed.state(), whole.state())
    assert resumed.before == whole.before


@pytest.mark.parametrize("name, package", [("prodigy", "prodigyopt"), ("schedule_free", "schedulefree")])
def test_other_optimizers_learn_and_go_on_bit_by_bit(name, package, tmp_path):
    pytest.importorskip(package)
    recipe = replace(QUICK, optimizer=name, ema=0.0)
    whole = stage(recipe=recipe)
    train(whole, 6)

    def end(done, total, losses):
        if done == 4:
            raise Stopped

    with JobFolder(tmp_path, recipe.to_json()) as job:
        run_stage(stage(recipe=recipe), job, end)
        resumed = stage(recipe=recipe)
        run_stage(resumed, job)
    assert same(resumed.state(), whole.state()) and resumed.measure() == whole.measure()


def test_infinite_options_of_an_optimizer_are_not_stored():
    """Prodigy has one, and files take finite numbers only."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [parameter], "growth_rate": float("inf")}])
    state = optimizer_state(optimizer)
    assert not any("growth_rate" in name for name in state) and any(name.endswith("lr") for name in state)
    restore_optimizer(optimizer, state)
    assert optimizer.param_groups[0]["growth_rate"] == float("inf")


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_interrupt_inside_an_update_changes_nothing(checkpointing, tmp_path):
    """Raised in any of a model's layers, in a checkpointed block's second run too; what was finished is kept."""
    recipe = replace(QUICK, checkpointing=checkpointing, block_updates=2, updates=3)
    whole = stage(recipe=recipe)
    train(whole, 5)
    interrupts = []
    with JobFolder(tmp_path, recipe.to_json()) as job:
        for lives in (40, 60, 82, 22, 13, 24, 10**6):  # layers that run before it
            trainee = ToyTrainee()
            left = [lives]

            def count(*_, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise Interrupted

            for block in (*trainee.module.double_blocks, *trainee.module.single_blocks):
                for layer in block.modules():
                    if isinstance(layer, torch.nn.Linear):
                        layer.register_forward_hook(count)
            run = stage(recipe=recipe, trainee=trainee)
            try:
                progress = run_stage(run, job)
            except Interrupted:
                interrupts.append(job.state()[1]["done"] if job.state() else 0)
    assert interrupts == [0, 0, 1, 2, 2, 2 if checkpointing else 3]
    assert progress.done == 5 and same(run.state(), whole.state())


def test_an_average_is_kept_and_measured():
    found = stage(recipe=replace(QUICK, ema=0.9))
    last = stage(recipe=replace(QUICK, ema=0.0))
    train(found, 6), train(last, 6)
    own = {name: each.detach().clone() for name, each in found.trainables.trained().items()}
    assert same(own, {name: each.detach() for name, each in last.trainables.trained().items()})
    averaged, lasted = found.measure().velocity, last.measure().velocity
    assert averaged != lasted
    assert same(own, {name: each.detach() for name, each in found.trainables.trained().items()}), "put back"
    kept, _ = found.result(Progress(6, {}, []))
    assert kept.recipe["finetune"]["error_after"] == averaged


def test_a_run_that_made_it_worse_gives_back_what_came_in():
    found = stage(recipe=QUICK)
    train(found, 6)
    found.before = Errors(1e-9, {})
    kept, text = found.result(Progress(6, {}, []))
    assert kept is found.trainables.student and "came out as it went in" in text


@pytest.mark.parametrize("start", [float("inf"), float("nan")])
def test_errors_that_are_not_finite_are_named_and_the_student_is_saved(tmp_path, start):
    found = stage(recipe=QUICK)
    train(found, 6)
    sites = {"double.0": 0.1, "single.0": float("nan"), "single.1": 0.2}
    found.before, found.measure = Errors(start, sites), lambda: Errors(start, sites)
    assert found.result(Progress(6, {}, []))[0] is found.trainables.student, "what is still infinite is no gain"
    found.measure = lambda: Errors(0.1, sites)
    kept, text = found.result(Progress(6, {}, []))
    assert "could not be measured, because values there are infinite or NaN: single.0" in text
    save_student(tmp_path / "student.safetensors", kept.student())
    student = load_student(tmp_path / "student.safetensors")
    assert student.site_errors.keys() == {"double.0", "single.1"}
    assert student.recipe["finetune"]["error_before"] is None and student.recipe["finetune"]["error_after"] == 0.1


def test_a_loss_that_is_not_finite_hands_on_what_was_learned_before(tmp_path):
    class Hot(ToyTrainee):
        predictions = 0

        def predict(self, draw, observe=None):
            self.predictions += 1
            return super().predict(draw, observe) * (float("inf") if self.predictions == 5 else 1)

    found = stage(WINDOW, replace(QUICK, block_updates=0, updates=9, delta_rate=1e-2), trainee=Hot())
    with JobFolder(tmp_path, {"a": 1}) as job:
        progress = run_stage(found, job)
    assert progress.done == 2, "two predictions measured"
    assert re.match("the loss (loss|prediction) is (inf|nan) at update 3; lower the learning rates", progress.problem)
    kept, _ = found.result(progress)
    assert kept.deltas and kept.recipe["finetune"]["notes"] == [progress.problem]


def test_a_run_without_an_update_gives_back_what_came_in():
    found = stage(recipe=QUICK)
    kept, text = found.result(Progress(0, {}, []))
    assert kept is found.trainables.student and "no update was finished" in text


def test_changes_that_came_in_are_trained_further():
    first = stage(WINDOW, replace(QUICK, block_updates=6, updates=0, delta_rate=1e-2))
    train(first, 6)
    kept, _ = first.result(Progress(6, {}, []))
    assert kept.deltas
    after = first.measure().velocity
    for trainables, kind in (("lora", LowRank), ("full", FullRank)):
        second = Finetune(ToyTrainee(), kept, replace(QUICK, trainables=trainables, rank=3), CPU)
        assert all(isinstance(delta, kind) for delta in second.trainables.deltas.values())
        assert second.measure().velocity == pytest.approx(after, rel=1e-4)
        train(second, 1)
    maps = Finetune(ToyTrainee(), replace(kept, sites=student(LINEAR).sites), replace(QUICK, trainables="maps"), CPU)
    assert not any(name.startswith("_deltas") for name in maps.trainables.trained())
    train(maps, 4)
    assert same(dict(maps.trainables.candidates({}, {}).deltas), dict(kept.deltas)), "kept, not trained"


def test_some_sites_only_train_their_own_projections():
    found = stage(LINEAR, sites={"single.1"})
    assert list(found.trainables.deltas) == ["single_blocks.1.linear1", "single_blocks.1.linear2"]
    train(found, 6)
    assert list(found.measure().sites) == ["single.1"]


def test_when_memory_runs_out_it_needs_less(tmp_path):
    class Heavy(ToyTrainee):
        failures = 3

        def predict(self, draw, observe=None):
            if torch.is_grad_enabled() and self.failures:
                self.failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().predict(draw, observe)

    trainee = Heavy()
    run = stage(recipe=replace(QUICK, block_updates=0, attention_every=1), trainee=trainee)
    with JobFolder(tmp_path, {"a": 1}) as job:
        progress = run_stage(run, job)
    assert progress.done == 3 and trainee.checkpointing
    assert progress.notes == [
        "memory ran out, so blocks are computed again in the backward pass",
        "memory ran out, so the attention of one site in 2 is compared",
        "memory ran out, so the attention of one site in 4 is compared",
    ]
    trainee = Heavy()
    trainee.failures = 100
    with JobFolder(tmp_path, {"a": 2}) as job, pytest.raises(OutOfMemory, match="lower rank"):
        run_stage(stage(recipe=replace(QUICK, block_updates=0), trainee=trainee), job)


def test_a_site_that_would_run_dense_is_an_error(monkeypatch):
    monkeypatch.setenv("LINEARIZE_STRICT", "0")
    found = stage(LINEAR)
    monkeypatch.setattr("linearize.attention.runtime.backends.TORCH.can_run", lambda call: found.why, raising=False)
    from linearize.attention.layout import Reason

    found.why = Reason("dtype", "not today")
    with pytest.raises(ValueError, match=r"double\.0 cannot be trained here: .*not today"):
        found.trainee.predict(Draw(0, 0.5, 1))
    found.why = None

    def explode(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("linearize.attention.runtime.backends.TORCH.run", explode, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        found.trainee.predict(Draw(0, 0.5, 1))


def test_saved_states_keep_the_names_of_pooling_weights():
    """Jobs that an earlier version began go on."""
    found = stage(POOLED)
    train(found, 1)
    pools = [name for name in found.state() if "pool" in name and name.startswith("block.parameters.")]
    assert sorted(pools) == [
        f"block.parameters.learned.sites.{site}.windows.pool" for site in ("double/0", "single/0", "single/1")
    ]


def test_operations_without_gradients_are_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("Trying to backward through ck.rope but no autograd formula was registered.\nMore")

    trainee = ToyTrainee()
    trainee.module.single_blocks[1].linear2.register_forward_hook(lambda m, args, out: Opaque.apply(out))
    with pytest.raises(ValueError, match=r"without gradients, so it cannot be fine-tuned \(Trying .* ck.rope"):
        stage(trainee=trainee).update(0)


def test_a_model_whose_attention_was_replaced_is_refused():
    trainee = ToyTrainee()
    trainee.roles.blocks.run = lambda path, arguments: ()
    with pytest.raises(ValueError, match="without calling the student's sites"):
        stage(trainee=trainee).update(0)


def test_students_that_do_not_fit_are_refused(monkeypatch):
    trainee = ToyTrainee()
    with pytest.raises(ValueError, match="host 'wan'"):
        Finetune(trainee, replace(student(LINEAR), host=WanHost.name), QUICK, CPU)
    with pytest.raises(ValueError, match="no feature maps or pooling weights to train; set rank above 0"):
        stage(WINDOW, replace(QUICK, trainables="maps"))
    with pytest.raises(ValueError, match="every site of this student is dense.*lower the budget of Budget Plan"):
        stage(DenseSpec(), replace(QUICK, trainables="maps"))
    lost = ToyTrainee()
    lost.blocks = {}
    with pytest.raises(ValueError, match=r"block of double\.0 cannot be told; set block_updates to 0"):
        stage(trainee=lost)
    stage(recipe=replace(QUICK, block_updates=0), trainee=lost).update(0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package prodigyopt"):
        stage(recipe=replace(QUICK, optimizer="prodigy"))
    assert not trainee.switch.is_student


def test_the_candidate_of_lowest_error_is_taken():
    one = student(LINEAR)
    several = {site: (Candidate(WINDOW, 2.0), *found, Candidate(WINDOW, 3.0)) for site, found in one.sites.items()}
    chosen, note = decided(replace(one, sites=several))
    assert chosen.sites == one.sites and "of 3 sites with several candidates" in note
    assert decided(one) == (one, "")


def test_noise_levels_are_drawn_as_named():
    draws = {name: [training_draw(0, number, range(5), False, name) for number in range(2000)] for name in NOISE_LEVELS}
    in_middle = {name: sum(0.25 < each.percent < 0.75 for each in found) / 2000 for name, found in draws.items()}
    assert in_middle["even"] == pytest.approx(0.5, abs=0.04)
    assert in_middle["middle"] == pytest.approx(0.728, abs=0.04)  # P(|x| < log 3) of a normal x
    assert [replace(each, unshifted=True) for each in draws["even"]] == draws["unshifted"]
    assert not any(each.unshifted for each in draws["even"] + draws["middle"])


@pytest.mark.parametrize("change, words", [
    ({"block_updates": 0, "updates": 0}, "both 0"),
    ({"flow": 0.0, "prediction": 0.0, "attention": 0.0}, "are all 0"),
    ({"ema": 1.0}, "ema is below 1"),
    ({"optimizer": "schedule_free"}, "set ema to 0"),
    ({"optimizer": "sgd"}, "optimizer is one of adamw"),
    ({"rank": 0}, "rank is a whole number of at least 1"),
    ({"trainables": "all"}, "trainables is one of lora, full, maps"),
    ({"noise_levels": "low"}, "noise_levels is one of middle, even, unshifted"),
    ({"flow": -1.0}, "flow is a number of at least 0"),
    ({"delta_rate": 0.0}, "delta_rate is a number above 0"),
], ids=lambda value: str(value)[:30])  # fmt: skip
def test_recipes_check_themselves(change, words):
    with pytest.raises(ValueError, match=words):
        replace(QUICK, **change)
