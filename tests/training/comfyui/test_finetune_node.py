"""Fine-tune Student on tiny models of ComfyUI's own classes: what it learns, resumes, returns and refuses."""

import copy
import dataclasses
import hashlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch


def hash_of(model):
    """Return a hash of every base weight of a model patcher."""
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def facts(student):
    return student.recipe["finetune"]


@pytest.mark.parametrize("name, kind", [("flux", "linear"), ("wan", "linear"), ("wan", "clear")])
def test_updates_lower_the_held_out_error(lab, name, kind):
    spec = lab.specs.LinearSpec("hedgehog") if kind == "linear" else lab.specs.ClearSpec(radius=1)
    model = lab.models[name].model
    before = hash_of(model)
    found, losses = lab.finetune(
        model, lab.student(name, spec), lab.samples(name), block_updates=10, updates=30, accumulation=2
    )
    assert facts(found)["error_after"] < 0.95 * facts(found)["error_before"], lab.shown
    assert len(losses["loss"]) == 40 and facts(found)["updates_done"] == 40
    assert found.deltas and found.fingerprint is not None and found.base_model == f"linearize_tiny_{name}.safetensors"
    assert all(0 < each.error < 10 for (each,) in found.sites.values())
    assert hash_of(model) == before, "the model that was wired is as it was"
    assert any("needs about" in text for text in lab.shown) and "before" in lab.shown[-1]
    (first, *_) = measured = [text for text in lab.shown if "measuring on held-out sample 1 of 2" in text]
    assert len(measured) == 2 and first.startswith("fine-tuning: ") and "needs about" in first


def test_a_finished_job_answers_without_the_model(lab, monkeypatch):
    given, samples = lab.student("flux", lab.specs.LinearSpec("hedgehog")), lab.samples("flux")
    found, losses = lab.finetune(lab.models["flux"].model, given, samples, seed=1)
    model = lab.module("training.comfyui.model")
    monkeypatch.setattr(model, "with_trainee", lambda *_: pytest.fail("the model was loaded"))
    again, same_losses = lab.finetune(lab.models["flux"].model, given, samples, seed=1)
    assert same_losses == losses and again.recipe == found.recipe
    assert same(again.deltas, found.deltas)
    for site, (each,) in found.sites.items():
        assert same(again.sites[site][0].parameters, each.parameters) and again.sites[site][0].spec == each.spec


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_cancelled_run_returns_its_best_and_goes_on_bit_by_bit(lab, name, stop, monkeypatch, tmp_path):
    import comfy.model_management
    import folder_paths

    model, samples = lab.models[name].model, lab.samples(name)
    given = lab.student(name, lab.specs.HybridSpec(2, "polynomial"))
    settings = {"seed": 10 + stop, "ema": 0.9, "accumulation": 2}
    run, cancelled = lab.module("nodes.training_run"), lab.module("nodes.finetune").LinearizeFinetune.fingerprint_inputs
    monkeypatch.setattr(run, "TEXT_INTERVAL_S", 0.0)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
        whole, losses = lab.finetune(model, given, samples, **settings)

    def cancel(text):
        lab.shown.append(text)
        if f"update {stop} of" in text:
            comfy.model_management.interrupt_current_processing()

    before = cancelled()
    with monkeypatch.context() as shows:
        shows.setattr(lab.module("nodes.node_status"), "show_on_node", lambda *_: cancel)
        partial, some = lab.finetune(model, given, samples, keep_unfinished=True, **settings)
    assert facts(partial)["unfinished"] == f"{stop} of 5 updates" and "unfinished" not in facts(whole)
    assert some["loss"] == losses["loss"][:stop] and facts(partial)["updates_done"] == stop
    assert f"UNFINISHED · cancelled after {stop} of 5 updates, run again to go on" in lab.shown[-1]
    assert cancelled() == before + 1, "the next run is not taken from ComfyUI's cache"
    rest, all_losses = lab.finetune(model, given, samples, **settings)
    assert all_losses == losses and same(rest.deltas, whole.deltas)
    assert facts(rest) == facts(whole)
    for site, (each,) in whole.sites.items():
        assert same(rest.sites[site][0].parameters, each.parameters)


@pytest.mark.parametrize("node", ["finetune", "distil"])
def test_a_cancel_ends_the_prompt_and_the_same_run_goes_on(lab, node, monkeypatch, tmp_path):
    """Nothing comes out of the node, so ComfyUI runs nothing behind it and keeps no result."""
    import comfy.model_management
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(lab.module("nodes.training_run"), "TEXT_INTERVAL_S", 0.0)
    model, samples = lab.models["flux"].model, lab.samples("flux")
    given = lab.student("flux", lab.specs.HybridSpec(2, "polynomial"))
    plan = lab.module("attention.plans").Plan("flux", lab.specs.HybridSpec(2, "polynomial"))

    def run():
        if node == "finetune":
            return lab.finetune(model, given, samples, seed=5)
        with torch.inference_mode():
            few = {"updates": 5, "held_out": 1, "output_draws": 0}
            return lab.node("LinearizeTransfer")(model=model, samples=samples, plans={"plan0": plan}, **few).args

    def interrupt():
        raise comfy.model_management.InterruptProcessingException

    def cancel(text):
        lab.shown.append(text)
        if "update 2 of 5" in text:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr(lab.module("nodes.node_status"), "show_on_node", lambda *_: cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run()
    assert lab.shown[-1] == "cancelled after 2 of 5 updates, run again to go on"
    with monkeypatch.context() as patch:
        loop = lab.module("training.jobs.run_job").SynchronizedStage
        patch.setattr(loop, "update", lambda *_: interrupt())
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run()
    assert lab.shown[-1] == "cancelled after 2 of 5 updates, run again to go on", "what earlier runs did counts"
    lab.shown.clear()
    _, losses = run()
    assert len(losses["loss"]) == 5 and not any("update 1 of 5" in text for text in lab.shown)


def test_a_cancel_is_heard_while_it_measures(lab, monkeypatch):
    """By the node itself: the core's own question, which its operations ask, is silenced."""
    import comfy.model_management
    import comfy.ops

    model, given = lab.models["flux"].model, lab.student("flux", lab.specs.LinearSpec("hedgehog"))
    samples = lab.samples("flux")

    def cancel(text):
        lab.shown.append(text)
        if "measuring on held-out sample 1 of 2" in text:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr(comfy.ops, "run_every_op", lambda: None)
        patch.setattr(lab.module("nodes.node_status"), "show_on_node", lambda *_: cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            lab.finetune(model, given, samples, seed=77)
    assert not any("sample 2 of 2" in text for text in lab.shown)
    assert lab.shown[-1] == "cancelled after 0 of 5 updates, run again to go on"
    _, losses = lab.finetune(model, given, samples, seed=77)
    assert len(losses["loss"]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full_rank", [False, True])
def test_apply_runs_what_was_attached(lab, comfy, dtype, full_rank, relative_error, tolerance, monkeypatch):
    """The student's changes as LoRA keys, through Apply, against the same changes as hooks."""
    monkeypatch.setattr(comfy_management(), "should_use_bf16", lambda *_, **__: dtype == torch.bfloat16)
    model, samples = lab.models["flux"].model, lab.samples("flux")
    trainee_module, teacher_module = lab.module("training.comfyui.trainee"), lab.module("training.comfyui.teacher")
    recipe = lab.module("training.engine.recipe").FinetuneRecipe(
        block_updates=0, updates=4, trainables="full" if full_rank else "lora", rank=4, delta_rate=1e-2, held_out=1,
        accumulation=1, warmup=0, ema=0.0,
    )  # fmt: skip
    draw, given = (
        lab.module("training.engine.protocols").Draw(0, 0.5, 7),
        lab.student("flux", lab.specs.ClearSpec(radius=2)),
    )

    def work(trainee):
        stage = lab.module("training.finetune.finetune").Finetune(trainee, given, recipe, torch.device("cpu"))
        for number in range(4):
            stage.update(number)
        with torch.no_grad():
            attached = trainee.predict(draw)
        teacher = trainee.watch(draw, lambda call: None)
        return attached, teacher, stage.trainables.candidates({}, {})

    with torch.inference_mode():
        attached, dense, found = trainee_module.with_trainee(model, samples, work)
        (applied,) = comfy.node("LinearizeApply")(model=model, attention=found).args
    applied.set_model_compute_dtype(dtype)
    runtime, seen = lab.models["flux"].patching.runtime_of(applied), []

    def look(guider, options):
        teacher = teacher_module.ComfyTeacher(guider, runtime, options, samples, applied.load_device)
        seen.append(teacher.watch(draw, lambda call: None))

    teacher_module.run_session(applied, runtime, samples, look)
    assert relative_error(attached, dense) > 10 * tolerance[dtype], "the student is another model"
    assert relative_error(attached, seen[0]) < 3 * tolerance[dtype]


def comfy_management():
    import comfy.model_management

    return comfy.model_management


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_trainee_as_teacher_is_the_teacher(lab, name, relative_error):
    """The copy in training form, checkpointed or not, predicts what the wired model predicts, LoRAs included."""
    import comfy.sd as comfy_sd

    layer = {"flux": "double_blocks.0.img_attn.qkv", "wan": "blocks.0.self_attn.q"}[name]
    model, samples = lab.models[name].model, lab.samples(name)
    shape = model.model_state_dict()[f"diffusion_model.{layer}.weight"].shape
    lora = {
        f"diffusion_model.{layer}.lora_up.weight": torch.randn(shape[0], 2) * 0.1,
        f"diffusion_model.{layer}.lora_down.weight": torch.randn(2, shape[1]) * 0.1,
    }
    model = comfy_sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
    draws = [lab.module("training.engine.protocols").Draw(1, percent, 3, name == "wan") for percent in (0.2, 0.8)]
    calls = {"teacher": [], "trainee": []}

    def look(role):
        return lambda model: [model.watch(draw, lambda call: calls[role].append(call)) for draw in draws]

    with torch.inference_mode():
        one = lab.module("training.comfyui.teacher").with_teacher(model, samples, look("teacher"))
        other = lab.module("training.comfyui.trainee").with_trainee(model, samples, look("trainee"))
    for first, second in zip(one, other, strict=True):
        assert relative_error(second, first) < 1e-5
    for first, second in zip(calls["teacher"], calls["trainee"], strict=True):
        assert first.site == second.site and relative_error(second.output, first.output) < 1e-5
    assert not comfy_management().in_training


def test_a_session_leaves_no_hooks_on_the_model(lab):
    """The teacher's modules are those of the model that others sample."""
    model, samples = lab.models["wan"].model, lab.samples("wan")
    draw = lab.module("training.engine.protocols").Draw(1, 0.5, 3)
    modules = list(model.model.diffusion_model.modules())

    def hooked():
        return sum(bool(each._forward_hooks or each._forward_pre_hooks) for each in modules)

    seen = []

    def look(teacher):
        teacher.watch(draw, seen.append)
        assert hooked()

    def fail(teacher):
        teacher.watch(draw, seen.append)
        raise KeyError("stopped")

    with torch.inference_mode():
        lab.module("training.comfyui.teacher").with_teacher(model, samples, look)
        assert seen and not hooked()
        with pytest.raises(KeyError, match="stopped"):
            lab.module("training.comfyui.teacher").with_teacher(model, samples, fail)
    assert not hooked()


def test_noise_levels_of_a_draw(lab, monkeypatch):
    """On the host's schedule, which Wan shifts towards noise; or of the noise itself, where there are flows."""
    import comfy.model_sampling as model_sampling

    model, samples, draw = (
        lab.models["wan"].model,
        lab.samples("wan"),
        lab.module("training.engine.protocols").Draw(0, 0.3, 1),
    )
    sampling = model.get_model_object("model_sampling")

    def look(teacher):
        for unshifted in (False, True):
            noised, level, clean = teacher.noised(dataclasses.replace(draw, unshifted=unshifted))
            found.append(float(level))
            noise = (noised - clean * (1 - level)) / level
            assert noise.std() == pytest.approx(1, abs=0.1), "x = (1 - level) clean + level noise"

    found: list[float] = []
    with torch.inference_mode():
        lab.module("training.comfyui.teacher").with_teacher(model, samples, look)
    shifted = float(sampling.percent_to_sigma(0.3))
    assert found == pytest.approx([shifted, 0.7]) and shifted > 0.75
    monkeypatch.setattr(model_sampling, "CONST", type("Other", (), {}))  # as if the host's noise were of another kind
    found.clear()
    with torch.inference_mode():
        lab.module("training.comfyui.teacher").with_teacher(model, samples, look)
    assert found == pytest.approx([shifted, shifted])


def test_pictures_of_the_student_are_shown(lab, monkeypatch):
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    seen = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)

    def hook(value, total, picture, **_):
        seen.append((value, picture))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    lab.finetune(
        lab.models["flux"].model, lab.student("flux", lab.specs.ClearSpec(radius=2)), lab.samples("flux"), seed=3,
        preview_every=2,
    )  # fmt: skip
    pictures = {value: picture[1].size for value, picture in seen if picture is not None}
    assert pictures == {2: (12, 8), 4: (12, 8)}, "one pixel per cell of the latent"


def test_with_a_vae_the_picture_shows_before_and_now(lab, monkeypatch):
    import comfy.utils

    seen, decoded = [], []
    patcher = SimpleNamespace(load_device=torch.device("cpu"))

    def decode(latent):
        decoded.append(tuple(latent.shape))
        return torch.zeros(1, 64, 96, 3)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, picture, **_: seen.append(picture))
    lab.finetune(
        lab.models["flux"].model, lab.student("flux", lab.specs.ClearSpec(radius=2)), lab.samples("flux"), seed=4,
        preview_every=2, vae=SimpleNamespace(decode=decode, patcher=patcher),
    )  # fmt: skip
    assert [picture[1].size for picture in seen if picture is not None] == [(2 * 96 + 4, 64)] * 2
    assert len(decoded) == 3, "before, and after updates 2 and 4"


def test_memory_is_told_to_a_factor_of_three(lab, monkeypatch):
    """What the blocks really keep for the backward pass, each storage once."""
    blocks, node = lab.module("training.finetune.blocks"), lab.module("nodes.finetune")
    recipe = lab.module("training.engine.recipe").FinetuneRecipe(
        block_updates=0, updates=1, accumulation=1, held_out=1, checkpointing=False, rank=4
    )
    kept = {}

    def count(tensor):
        alias = tensor.detach()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[alias.untyped_storage().data_ptr()] = alias  # alive, so no address comes twice
        return alias

    monkeypatch.setattr(blocks, "_alias", count)
    for spec in (lab.specs.ClearSpec(radius=2), lab.specs.LinearSpec("hedgehog")):

        def work(trainee, spec=spec):
            given = lab.student("flux", spec)
            stage = lab.module("training.finetune.finetune").Finetune(trainee, given, recipe, torch.device("cpu"))
            needed = node.needed_memory(trainee, stage)
            kept.clear()
            stage.update(0)
            for each in trainee.module.parameters():
                kept.pop(each.untyped_storage().data_ptr(), None)  # the frozen weights themselves
            return needed

        with torch.inference_mode():
            needed = lab.module("training.comfyui.trainee").with_trainee(
                lab.models["flux"].model, lab.samples("flux"), work
            )
        taken = sum(each.untyped_storage().nbytes() for each in kept.values())
        assert taken / 3 < needed.activations < taken * 3


def refused(lab, words, model=None, given=None, samples=None, **inputs):
    model = model or lab.models["flux"].model
    given = given or lab.student("flux", lab.specs.LinearSpec("hedgehog"))
    with pytest.raises(ValueError, match=words):
        lab.finetune(model, given, samples or lab.samples("flux"), seed=5, **inputs)


def test_what_cannot_be_trained_is_refused_in_a_sentence(lab, monkeypatch):
    flux, specs = lab.models["flux"], lab.specs
    refused(lab, "this model is linearized already", model=flux.clear(flux.model, radius=2))
    refused(lab, "samples in .* are of host wan", samples=lab.samples("wan"))
    refused(lab, "student is for host 'wan', this model is 'flux'", given=lab.student("wan", specs.LinearSpec()))
    refused(lab, "set rank above 0", given=lab.student("flux", specs.ClearSpec(radius=2)), rank=0)
    with monkeypatch.context() as missing:
        find = importlib.util.find_spec
        missing.setattr(importlib.util, "find_spec", lambda name: None if name == "prodigyopt" else find(name))
        refused(lab, "package prodigyopt, which is not installed", optimizer="prodigy")
    refused(lab, "set ema to 0", optimizer="schedule_free", ema=0.5)
    refused(lab, "both 0", updates=0, block_updates=0)
    other = flux.model.clone()
    other.cached_patcher_init = None
    refused(lab, "cannot load it a second time.*Load Diffusion Model", model=other)
    assert not comfy_management().in_training
    refused(lab, "does not know this model", model=Unknown())


class Unknown:
    def get_model_object(self, name):
        return torch.nn.Linear(2, 2)


def test_a_students_file_and_several_candidates(lab, comfy):
    specs = lab.specs
    several = lab.student("flux", specs.LinearSpec("hedgehog"), count=2)
    found, _ = lab.finetune(lab.models["flux"].model, several, lab.samples("flux"), updates=12)
    assert "of 4 sites with several candidates the one of lowest error was taken" in lab.shown[-1]
    file = lab.candidates.Candidates.of_student(
        found.student(), {site: one.spec for site, (one,) in found.sites.items()}
    )
    again, _ = lab.finetune(lab.models["flux"].model, file, lab.samples("flux"), updates=12, delta_rate=1e-4)
    assert set(again.deltas) == set(found.deltas), "the changes that were there are trained further"
    assert not same(again.deltas, found.deltas)
    (applied,) = comfy.node("LinearizeApply")(model=lab.models["flux"].model, attention=again).args
    lab.models["flux"].sample(applied)
    assert set(lab.models["flux"].ran(applied).values()) == {("linear", "torch")}


def test_maps_alone(lab):
    given = lab.student("flux", lab.specs.LinearSpec("hedgehog"))
    found, _ = lab.finetune(lab.models["flux"].model, given, lab.samples("flux"), seed=7, rank=0)
    assert not found.deltas and "4 sites" not in lab.shown[-1]
    learned = found.sites["double.0"][0].parameters
    assert not same(learned, given.sites["double.0"][0].parameters)


def test_other_settings_are_another_job(lab):
    lab.jobs.mkdir(parents=True, exist_ok=True)

    def jobs():
        return {path.name for path in lab.jobs.iterdir()}

    model, samples = lab.models["flux"].model, lab.samples("flux")
    seen = [jobs()]
    jobs_module, comfy_model = lab.module("training.jobs.run_job"), lab.module("training.comfyui.model").ComfyModel
    student, workers = lab.student("flux", lab.specs.LinearSpec("hedgehog")), lab.module("training.jobs.distributed")

    def opened(model, samples, recipe):
        job = jobs_module.Job(lab.jobs, recipe, student=student)
        with jobs_module.open_job(job, comfy_model(model), samples, workers.ProcessGroup()):
            pass

    recipes = [lab.module("training.engine.recipe").FinetuneRecipe(seed=seed) for seed in (91, 92)]
    for recipe in recipes:
        opened(model, samples, recipe)
        seen.append(jobs())
    opened(model, samples, recipes[0])
    shifted = model.clone()
    sampling = model.get_model_object("model_sampling")
    other = copy.deepcopy(sampling)
    other.set_parameters(shift=3.3)
    shifted.add_object_patch("model_sampling", other)
    opened(shifted, samples, recipes[0])
    seen.append(jobs())
    opened(lora_on(model), samples, recipes[0])
    seen.append(jobs())
    opened(lora_on(model), samples, recipes[0])
    opened(lora_on(model, 0.5), samples, recipes[0])
    seen.append(jobs())
    assert [len(new - old) for old, new in zip(seen, seen[1:], strict=False)] == [1, 1, 1, 1, 1]


def lora_on(model, strength=1.0):
    import comfy.sd as comfy_sd

    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    lora = {f"{name}.lora_up.weight": torch.ones(768, 2), f"{name}.lora_down.weight": torch.ones(2, 256)}
    return comfy_sd.load_lora_for_models(model, None, lora, strength, 0)[0]
