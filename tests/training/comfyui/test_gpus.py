"""The input gpus of the nodes that train: processes of this machine (here on the CPU), watched, cancelled, refused."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from sample_maker import noise


@pytest.fixture(scope="module")
def model(comfy):
    """The tiny FLUX as its loader gives it."""
    with torch.inference_mode():
        return comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", "default")[0]


def condition(number):
    return [[noise(number, 1, 12, 64), {"pooled_output": noise(number + 1, 1, 32)}]]


@pytest.fixture
def lab(comfy, model, tmp_path, monkeypatch):
    """Distill Attention on the tiny FLUX with ComfyUI's output folder elsewhere."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setenv("LINEARIZE_STRICT", "1")
    shown = []
    monkeypatch.setattr(comfy.module("nodes.node_status"), "show_on_node", lambda *_: shown.append)
    schema = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeTeacherSamples"].define_schema()
    values = {each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None}
    values |= {"model": model, "latent_image": {"samples": torch.zeros(1, 16, 8, 12)}, "steps": 2, "prompts": ""}
    values = {key: [value] for key, value in values.items()}
    values["positive"] = [condition(number) for number in range(4)]
    plans, specs = comfy.module("attention.plans"), comfy.module("attention.specs")
    with torch.inference_mode():
        samples = comfy.node("LinearizeTeacherSamples")(**values).args[0]

    def distil(model=model, kinds=("hedgehog",), **inputs):
        given = {f"plan{n}": plans.Plan("flux", specs.LinearSpec(kind)) for n, kind in enumerate(kinds)}
        more = {"updates": 3, "held_out": 1, "output_draws": 0, "gpus": 2, **inputs}
        with torch.inference_mode():
            return comfy.node("LinearizeTransfer")(model=model, samples=samples, plans=given, **more).args

    jobs = tmp_path / "linearize" / "jobs"
    return SimpleNamespace(distil=distil, shown=shown, jobs=jobs, module=comfy.module, model=model, comfy=comfy)


def test_two_processes_train_for_the_node(lab):
    student, losses = lab.distil(kinds=("hedgehog", "polynomial"))
    assert {len(found) for found in student.sites.values()} == {2} and len(losses["loss"]) == 3
    assert student.recipe["transfer"]["updates_done"] == 3 and student.fingerprint is not None
    assert any("update 3 of 3" in text for text in lab.shown) and "held-out error" in lab.shown[-1]
    assert "distilling attention: measuring on held-out sample 1 of 1" in lab.shown
    (job,) = lab.jobs.iterdir()
    assert sorted(path.name for path in job.iterdir()) == [
        "job.json",
        "lock",
        "result.safetensors",
        "state.safetensors",
    ]
    lab.shown.clear()
    again, _ = lab.distil(kinds=("hedgehog", "polynomial"))
    assert len(lab.shown) == 1, "a finished job answers at once"
    for site, found in student.sites.items():
        for one, other in zip(found, again.sites[site], strict=True):
            assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)


def test_the_node_says_what_it_measures_and_makes(lab):
    lab.distil(gpus=1, updates=2, held_out=2, output_draws=2)
    measured = [f"distilling attention: measuring on held-out sample {number} of 2" for number in (1, 2)]
    made = [f"distilling attention: making matrices, pass {number} of 2" for number in (1, 2)]
    between = [text for text in lab.shown if text.startswith("distilling attention: ") and "update " not in text]
    assert between == measured + measured + made + measured


WARNING = (
    "torch/distributed/elastic/multiprocessing/redirects.py:35] NOTE: Redirects are currently not supported in MacOs"
)
ENDS = (
    "torch/distributed/elastic/multiprocessing/api.py:1029] Sending process 7 closing signal SIGTERM",
    "torch/distributed/elastic/multiprocessing/api.py:1003] failed (exitcode: 1) local_rank: 0 (pid: 7) of binary: py",
)


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_the_words_of_the_processes_are_told_from_the_launchers(comfy, slash):
    """torch warns when it is imported on macOS, and its paths have backslashes on Windows."""
    own_words = comfy.module("nodes.training_worker").own_words
    said = f"W1 2 {WARNING}\n".replace("/", slash) + "out of paper"
    for end in ENDS:
        assert own_words(f"{said}\nE1 2 {end}\nTraceback\n".replace("/", slash)) == said
    assert own_words(said) == said


@pytest.mark.parametrize("place", ["measuring on held-out sample 1 of 3", "making matrices, pass 1 of 3"])
def test_a_cancel_is_heard_between_updates_and_the_run_goes_on(lab, monkeypatch, place):
    """By the node itself: the core's own question, which its operations ask, is silenced."""
    import comfy.model_management
    import comfy.ops

    settings = {"gpus": 1, "updates": 2, "held_out": 3, "output_draws": 3}

    def cancel(text):
        lab.shown.append(text)
        if place in text:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr(comfy.ops, "run_every_op", lambda: None)
        patch.setattr(lab.module("nodes.node_status"), "show_on_node", lambda *_: cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            lab.distil(**settings)
    how_far = "" if place.startswith("measuring") else " after 2 of 2 updates"
    assert place in lab.shown[-2] and lab.shown[-1] == f"cancelled{how_far}, run again to go on"
    lab.shown.clear()
    _, losses = lab.distil(**settings)
    assert len(losses["loss"]) == 2 and "held-out error" in lab.shown[-1]
    assert any("update 2 of 2" in text for text in lab.shown) == ("measuring" in place), "updates are not repeated"


def test_a_cancelled_run_stops_the_processes_and_goes_on(lab, monkeypatch):
    import comfy.model_management

    def cancel():
        if any("update " in text and " of 60" in text for text in lab.shown):
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            lab.distil(updates=60)
    assert any(text.endswith("stopping after this update") for text in lab.shown)
    assert re.fullmatch(r"cancelled after \d+ of 60 updates, run again to go on", lab.shown[-1])
    (job,) = lab.jobs.iterdir()
    log = (job / "worker" / "worker.log").read_text()
    assert "of 60 updates and saved" in log, log
    assert (job / "state.safetensors").is_file() and [*job.rglob("state.safetensors")] == [job / "state.safetensors"]
    lab.shown.clear()
    _, losses = lab.distil(updates=60)
    assert len(losses["loss"]) == 60 and not any("update 1 of 60" in text for text in lab.shown)


def test_models_that_a_file_does_not_describe_are_refused(lab):
    with_lora = lab.model.clone()
    name = next(name for name in with_lora.model.state_dict() if name.endswith("img_attn.qkv.weight"))
    with_lora.add_patches({name: (torch.zeros_like(with_lora.model.state_dict()[name]),)})
    shifted = lab.model.clone()
    shifted.add_object_patch("model_sampling", lab.model.get_model_object("model_sampling"))
    for model in (with_lora, shifted):
        with pytest.raises(ValueError, match="without what other nodes changed on the model, such as LoRAs"):
            lab.distil(model)
    elsewhere = lab.model.clone()
    elsewhere.cached_patcher_init = None
    with pytest.raises(ValueError, match="load it with ComfyUI's own Load Diffusion Model or Load Checkpoint, or set"):
        lab.distil(elsewhere)


def test_more_than_the_machine_has_is_refused_with_what_it_has(lab, monkeypatch):
    with pytest.raises(ValueError, match=f"this machine has {os.cpu_count()} processor cores and no GPU"):
        lab.distil(gpus=64)
    import comfy.model_management

    worker = lab.module("nodes.training_worker")
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        with pytest.raises(ValueError, match="gpus is 2, this machine has 1 GPU$"):
            worker.check_count(2)


def test_the_words_of_the_loader_are_told_back(lab, comfy):
    worker = lab.module("nodes.training_worker")
    for word in lab.module("training.jobs.description").WEIGHT_DTYPES:
        with torch.inference_mode():
            (model,) = comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", word)
        file = worker.model_file(model)
        assert (file.weight_dtype, file.kind, file.file.name) == (
            word, "diffusion_model", "linearize_tiny_flux.safetensors"
        )  # fmt: skip


def test_what_went_wrong_in_a_process_is_the_nodes_error(lab, monkeypatch):
    worker = lab.module("nodes.training_worker")

    def launch(code):
        monkeypatch.setattr(worker, "launch_command", lambda _, file, __: [sys.executable, "-c", code, str(file)])

    def tell(*lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        launch("import sys, pathlib; folder = pathlib.Path(sys.argv[1]).parent / 'student.job';"
               f"folder.mkdir(exist_ok=True); (folder / 'progress.jsonl').open('a').write({text!r});"
               "sys.exit(1)")  # fmt: skip

    tell({"problem": "the disk is full"})
    with pytest.raises(ValueError, match="^the disk is full$"):
        lab.distil()
    tell({"update": 3, "of": 3, "losses": {"loss": 0.5}, "seconds": 1.0}, {"status": "measuring"}, {"problem": "no"})
    with pytest.raises(ValueError, match="^no$"):
        lab.distil()
    assert "update 3 of 3" in lab.shown[-2] and lab.shown[-1].endswith(": measuring"), "both were told at once"
    launch("raise SystemExit('a driver is missing')")
    with pytest.raises(ValueError, match=r"(?s)ended with exit code 1; the end of .*worker\.log:\na driver is missing"):
        lab.distil()
    ends = "1 2 torch/distributed/elastic/multiprocessing/api.py:1003] failed (exitcode: 1) local_rank: 0"
    launch(f"import sys; sys.exit('out of paper\\n{ends}\\n' + 9000 * 'at ')")
    with pytest.raises(ValueError, match="worker.log:\nout of paper$"):
        lab.distil()
