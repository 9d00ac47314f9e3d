"""Calibrate Attention through its node: what then runs, what is remembered, cancelled and refused."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")
FEW = "clear 3, foveated 0.3"
ERROR = {"target": "least time", "max_error": 0.5}
SHARE = {"target": "least error", "time_share": 0.5}


@pytest.fixture
def home(comfy, tmp_path, monkeypatch):
    """An empty folder of calibrations; every dense call takes 1 s, and each candidate less than the one before."""
    import folder_paths

    watch = comfy.module("attention.calibration.watch")
    answers = itertools.cycle([1.0, 0.3, 0.2])

    def call_seconds(device, compute, **_):
        compute()
        return next(answers)

    monkeypatch.setattr(watch, "call_seconds", call_seconds)
    module = comfy.module("patching.calibrate")
    choose = module.choose
    monkeypatch.setattr(module, "choose", lambda *given: choose(*given[:4]))  # steps of a tiny model gain nothing
    monkeypatch.setattr(folder_paths, "get_system_user_directory", lambda name: str(tmp_path / name))
    folder = Path(folder_paths.get_folder_paths("linearize")[0]) / "plans"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def calibrate(comfy, studio):
    """A function that runs the node on the tiny FLUX with some inputs changed."""

    def run(model=None, size=(16, 24), made=studio, **inputs):
        given = {"positive": made.condition(), "latent_image": {"samples": torch.zeros(2, 16, *size)}, "target": SHARE,
                 "candidates": FEW, "steps": 5, "checks": 2, **inputs}  # fmt: skip
        with torch.inference_mode():
            return comfy.node("LinearizeCalibrate")(model=model or made.model, **given)

    return run


@pytest.fixture
def dense_only(comfy, monkeypatch):
    """Make measuring an error: what a run then knows, it remembered."""
    calibrations = comfy.module("patching.calibrations")

    def measured(*args, **kwargs):
        raise AssertionError("measured again")

    return lambda: monkeypatch.setattr(calibrations, "calibrate", measured)


@pytest.mark.parametrize("target", [ERROR, SHARE], ids=["least time", "least error"])
def test_the_patched_model_runs_what_the_text_says(home, studio, calibrate, target):
    before = studio.sample(studio.model)
    model, plan, text, picture, second = calibrate(target=target)
    after = studio.sample(model)
    specs = plan.resolve(SITES)
    ran = {site: ("dense", "host") if spec.is_dense else (spec.kind, "torch") for site, spec in specs.items()}
    assert studio.ran(model) == ran and any(not spec.is_dense for spec in specs.values())
    assert text.startswith("CALIBRATED · ") and "error 0." in text and "measured 20" in text
    assert "192 x 128 pixels" in text or "384 x 256 pixels" in text, text
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and second is None
    assert (after - before).abs().max() > 1e-5
    assert torch.equal(studio.sample(studio.model), before), "the model that came in runs as before"
    assert studio.patching.runtime_of(studio.model) is None


def test_an_error_that_no_candidate_keeps_leaves_all_dense(home, studio, calibrate):
    model, plan, text, *_ = calibrate(target={"target": "least time", "max_error": 1e-9})
    assert text.startswith("DENSE · ") and all(spec.is_dense for spec in plan.resolve(SITES).values())
    assert (studio.sample(model) - studio.sample(studio.model)).abs().max() == 0


def test_what_was_measured_is_remembered(home, studio, calibrate, dense_only):
    _, plan, text, *_ = calibrate()
    dense_only()
    _, again, told, *_ = calibrate()
    assert again == plan and told.replace("; remembered", "") == text
    _, _, told, *_ = calibrate(target=ERROR)
    assert "this choice was not run" in told and "error about" in told
    _, _, told, *_ = calibrate(size=(16, 30))
    assert "worked out for" in told and "at latent 16 x 16 x 24" in told
    for other in ({"again": True}, {"size": (32, 64)}, {"candidates": "clear 4, clear 5"},
                  {"cfg": 2.0, "negative": studio.condition("b")}):  # fmt: skip
        with pytest.raises(AssertionError, match="measured again"):
            calibrate(**other)


def test_what_errors_depend_on_is_measured_anew(home, studio, calibrate, dense_only):
    """A LoRA, more steps, and a size whose only neighbour was sampled with guidance."""
    calibrate()
    calibrate(size=(16, 40), cfg=3.0, negative=studio.condition("b"))
    dense_only()
    weight = studio.model.model.diffusion_model.single_blocks[0].linear1.weight
    patched = studio.model.clone()
    patched.add_patches({"diffusion_model.single_blocks.0.linear1.weight": (torch.ones_like(weight),)}, 0.1)
    for other in ({"model": patched}, {"steps": 6}, {"size": (16, 76)}):
        with pytest.raises(AssertionError, match="measured again"):
            calibrate(**other)


@pytest.mark.parametrize("size", [(16, 24), (16, 30)], ids=["same size", "near"])
def test_what_was_measured_with_guidance_is_not_that_of_a_run_without(home, studio, calibrate, dense_only, size):
    calibrate(cfg=2.0, negative=studio.condition("b"))
    dense_only()
    with pytest.raises(AssertionError, match="measured again"):
        calibrate(size=size)


def test_several_prompts_in_one_are_measured_anew(home, studio, calibrate, dense_only):
    calibrate()
    dense_only()
    (tensor, options), *_ = studio.condition("b")
    for positive in (
        [*studio.condition(), (tensor, options)],
        [(tensor, {**options, "area": (8, 8, 0, 0)})],
        [(tensor, {**options, "start_percent": 0.0, "end_percent": 0.5}), *studio.condition()],
    ):
        with pytest.raises(AssertionError, match="measured again"):
            calibrate(positive=positive)


def test_another_dtype_of_the_computation_is_measured_anew(home, studio, calibrate, dense_only):
    calibrate()
    dense_only()
    other = studio.model.clone()
    other.set_model_compute_dtype(torch.bfloat16)
    with pytest.raises(AssertionError, match="measured again"):
        calibrate(model=other)


def test_another_machine_measures_anew(home, calibrate, dense_only):
    calibrate()
    (path,) = home.iterdir()
    data = json.loads(path.read_text())
    data["machine"]["device"] = "another card"
    path.write_text(json.dumps(data))
    dense_only()
    with pytest.raises(AssertionError, match="measured again"):
        calibrate()


@pytest.mark.parametrize("at", [1, 3, 5], ids=["early", "late", "in the checks"])
def test_a_cancelled_run_goes_on_where_it_was(comfy, home, tmp_path, studio, calibrate, monkeypatch, at):
    whole = calibrate(again=True)
    module = comfy.module("patching.calibrate")
    step, check, steps = module._Work._step, module._Work._check, []

    class Cancelled(BaseException):
        pass

    def counted(self, model, x, sigma, extra_args, number):
        if len(steps) == at:
            raise Cancelled
        steps.append(number)
        return step(self, model, x, sigma, extra_args, number)

    def cancelled(self, *given):
        raise Cancelled

    monkeypatch.setattr(module._Work, "_step", counted)
    monkeypatch.setattr(module._Work, "_check", cancelled)
    with pytest.raises(Cancelled):
        calibrate(again=True)
    (state,) = (tmp_path / "linearize").iterdir()
    monkeypatch.setattr(module._Work, "_check", check)
    at = -1
    calibrated = calibrate(again=True)
    assert steps == [0, 1, 2, 3, 4], "no step ran twice, none was left out"
    assert not state.exists()
    assert set(calibrated[1].resolve(SITES).values()) and whole[1].resolve(SITES).keys()


def test_a_resumed_run_compares_with_the_strengths_that_go_on(comfy, home, studio, calibrate, monkeypatch):
    module, found = comfy.module("patching.calibrate"), []
    choice = comfy.module("attention.calibration.choice").Choice

    class Cancelled(BaseException):
        pass

    def cancelled(*given):
        raise Cancelled

    def patched(strength):
        model, name = studio.model.clone(), "diffusion_model.single_blocks.0.linear1.weight"
        model.add_patches(
            {name: (torch.ones_like(model.model.diffusion_model.single_blocks[0].linear1.weight),)}, strength
        )
        return model

    def all_dense(sites, target, check, *_):
        found.append(check({}).error)
        return choice({}, {}, 0.0, None)

    monkeypatch.setattr(module, "choose", cancelled)
    with pytest.raises(Cancelled):
        calibrate(model=patched(0.1))
    monkeypatch.setattr(module, "choose", all_dense)
    calibrate(model=patched(0.2))
    assert found == [pytest.approx(0.0, abs=1e-9)], "dense attention is compared with itself"


def test_what_a_calibration_cost_counts_the_interrupted_part(comfy, home, calibrate, monkeypatch):
    module = comfy.module("patching.calibrate")

    class Cancelled(BaseException):
        pass

    def cancelled(self, *given):
        raise Cancelled

    def long_ago(self, *given):
        self.began -= 1000
        return step(self, *given)

    step = module._Work._step
    with monkeypatch.context() as patch:
        patch.setattr(module._Work, "_step", long_ago)
        patch.setattr(module._Work, "_check", cancelled)
        with pytest.raises(Cancelled):
            calibrate()
    calibrate()
    (path,) = home.iterdir()
    (size,) = json.loads(path.read_text())["sizes"].values()
    assert 5000 < size["spent"] < 5600, "five steps of 1000 s, and what was really spent"


def test_a_run_that_goes_on_before_its_seconds_are_known_compares_little(comfy, home, calibrate, monkeypatch):
    module, strides = comfy.module("patching.calibrate"), []
    step, stride = module._Work._step, module._Work._stride

    class Cancelled(BaseException):
        pass

    def cancelled(self, *given):
        if given[-1] == 1:
            raise Cancelled
        return step(self, *given)

    def noted(self):
        strides.append(stride(self))
        return strides[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module._Work, "_step", cancelled)
        with pytest.raises(Cancelled):
            calibrate()
    monkeypatch.setattr(module._Work, "_stride", noted)
    text = calibrate()[2]
    assert strides[0] == 3, "of five steps three are watched, in which each site has one turn"
    assert "not measured" not in text


def test_more_checks_than_asked_for_are_announced(comfy, home, studio, calibrate, monkeypatch):
    told = []
    module, choice = comfy.module("patching.calibrate"), comfy.module("attention.calibration.choice")

    def five_checks(sites, target, check, *_):
        return choice.Choice({}, {}, 0.0, [check({}) for _ in range(5)][-1])

    monkeypatch.setattr(module, "choose", five_checks)
    monkeypatch.setattr(studio.node_status, "show_on_node", lambda node_id, lines=(): told.append)
    calibrate(target=ERROR)
    said = [text for text in told if "checking plan" in text]
    assert ["plan 1 of up to 2" in said[0], "plan 3 of up to 6" in said[2]] == [True, True], said


def test_latents_of_several_parts_are_one_of_a_batch_too(comfy, studio):
    from comfy.nested_tensor import NestedTensor

    samples = NestedTensor([torch.ones(3, 16, 2, 4, 4), torch.ones(3, 8, 5)])
    latent = comfy.module("nodes.calibrate").empty_latent(studio.model, {"samples": samples})
    assert [tuple(part.shape) for part in latent.unbind()] == [(1, 16, 2, 4, 4), (1, 8, 5)]


@pytest.mark.parametrize("other", ["steps", "prompt"])
def test_a_state_of_other_inputs_is_left_alone(comfy, home, tmp_path, studio, calibrate, monkeypatch, other):
    module = comfy.module("patching.calibrate")

    class Cancelled(BaseException):
        pass

    def cancelled(self, *given):
        raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(module._Work, "_check", cancelled)
        with pytest.raises(Cancelled):
            calibrate()
    (state,) = (tmp_path / "linearize").iterdir()
    calibrate(**({"steps": 6} if other == "steps" else {"positive": studio.condition("another prompt")}))
    assert state.exists()


def test_guidance_is_sampled_with_both_halves(home, studio, calibrate):
    model, plan, *_ = calibrate(cfg=3.0, negative=studio.condition("b", tokens=20))
    latent = studio.sample(model, cfg=3.0, negative=studio.condition("b", tokens=20))
    assert latent.isfinite().all() and any(not spec.is_dense for spec in plan.resolve(SITES).values())


def test_an_untrained_node_before_it_is_replaced(comfy, home, studio, calibrate):
    earlier = studio.clear(studio.model, radius=2)
    _, plan, *_ = calibrate()
    model, again, *_ = calibrate(model=earlier, again=True)
    studio.sample(model)
    assert {site: kind for site, (kind, _) in studio.ran(model).items()} == {
        site: spec.kind for site, spec in again.resolve(SITES).items()
    }
    assert again.resolve(SITES).keys() == plan.resolve(SITES).keys()


def test_both_experts_get_a_plan_of_their_own(home, wan, calibrate, comfy):
    other = wan.model.clone()
    found = calibrate(made=wan, size=(3, 8, 10), low_noise_model=other, positive=wan.condition())
    high, _, text, _, low = found
    for model in (high, low):
        wan.sample(model, size=(3, 8, 10))
        assert {kind for kind, _ in wan.ran(model).values()} <= {"clear", "foveated", "dense"}
        assert any(kind != "dense" for kind, _ in wan.ran(model).values())
    assert text.count("CALIBRATED") == 2 and "latent frames" in text


def test_report_and_apply_say_what_was_measured(comfy, home, studio, calibrate, notes):
    model, plan, *_ = calibrate()
    with torch.inference_mode():
        text = comfy.node("LinearizeReport")(model=model, width=384, height=256)[0]
        comfy.node("LinearizeApply")(model=studio.model, attention=plan)
    assert "attention of 4 sites" in text and "measured 20" in text
    assert any("measured 20" in each for each in notes), notes


def test_far_below_the_measured_size_attention_stays_dense(home, studio, calibrate):
    model, *_ = calibrate()
    studio.sample(model, size=(8, 8))
    record = studio.record(model)
    assert {ran.kind for ran in record.ran} == {"dense"}
    assert {reason.code for _, reason in record.skipped} == {"min_tokens"}


def test_what_cannot_be_is_a_sentence(comfy, home, studio, calibrate):
    with pytest.raises(ValueError, match="needs a negative prompt"):
        calibrate(cfg=2.0)
    with pytest.raises(ValueError, match="cannot read the candidate"):
        calibrate(candidates="clear 3, quick 4")
    cls = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeCalibrate"]
    assert cls.validate_inputs(candidates="clear x").startswith("cannot read the candidate")
    assert cls.validate_inputs(candidates=FEW) is True


def test_budget_plan_counts_milliseconds(comfy, studio, monkeypatch):
    times, candidates = comfy.module("attention.calibration.times"), comfy.module("attention.students.candidates")
    specs = comfy.module("attention.specs")
    seconds = iter([0.2, 0.9, 1.0])  # of two candidates the one with fewer operations is slower; dense comes last
    monkeypatch.setattr(times, "call_seconds", lambda device, compute: compute() is not None and next(seconds))
    pair = (candidates.Candidate(specs.ClearSpec(6), 0.1), candidates.Candidate(specs.ClearSpec(2), 0.2))
    student = candidates.Candidates("flux", dict.fromkeys(SITES, pair))
    given = {"model": studio.model, "student": student, "budget": 0.5, "width": 384, "height": 256, "frames": 1}
    _, plan, text = comfy.node("LinearizeBudgetPlan")(**given, count="milliseconds")
    assert set(plan.resolve(SITES).values()) <= {specs.ClearSpec(6), specs.DenseSpec()}
    assert "of dense attention's time, budget 50.0%" in text
    assert "of dense FLOPs" in comfy.node("LinearizeBudgetPlan")(**{**given, "budget": 0.99})[2]


def test_another_attention_below_is_what_dense_means(home, studio, calibrate):
    """As a node for SageAttention has it: its calls are timed, its name is part of what is remembered."""
    calls = []

    def quicker(func, *args, **kwargs):
        calls.append(args[0].shape)
        return func(*args, **kwargs)

    other = studio.model.clone()
    other.model_options["transformer_options"] = {"optimized_attention_override": quicker}
    model, *_ = calibrate(model=other)
    assert len(calls) > 4 * 5, "all steps, and once more for the stopwatch"
    calls.clear()
    studio.sample(model)
    (path,) = home.iterdir()
    assert "another override (test_another_attention_below" in json.loads(path.read_text())["machine"]["attention"]
    assert {kind for kind, _ in studio.ran(model).values()} & {"clear", "foveated"}


def test_a_lora_is_measured_with_and_stays(home, studio, calibrate):
    key = "diffusion_model.single_blocks.0.linear1.weight"
    weight = studio.model.model.diffusion_model.single_blocks[0].linear1.weight
    patched = studio.model.clone()
    assert patched.add_patches({key: (0.05 * torch.ones_like(weight),)}, 1.0)
    plain, changed = studio.sample(studio.model), studio.sample(patched)
    model, *_ = calibrate(model=patched, target={"target": "least time", "max_error": 1e-9})
    assert (studio.sample(model) - changed).abs().max() < 1e-5 < (plain - changed).abs().max()


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "gguf"])
def test_packed_weights_are_calibrated(home, studio, packed_base, calibrate, kind):
    model, plan, *_ = calibrate(model=packed_base(kind))
    assert studio.sample(model).isfinite().all()
    assert any(not spec.is_dense for spec in plan.resolve(SITES).values())
