"""Training without ComfyUI's server: the job's file, the worker in one process and in two, stops and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sample_maker import about, noise
from two_ranks import alone

from linearize.attention.specs import HybridSpec, LinearSpec
from linearize.attention.students.file import load_student
from linearize.training import __main__ as command
from linearize.training.engine.job_folder import JobFolder, read_values
from linearize.training.engine.loop import NotFinite
from linearize.training.engine.recipe import FinetuneRecipe, TransferRecipe
from linearize.training.engine.results import unpack
from linearize.training.jobs.description import MOST_BYTES, job_from_json, read_job
from linearize.training.jobs.distributed import ProcessGroup
from linearize.training.jobs.progress_file import ProgressFile, ProgressReader
from linearize.training.jobs.run_job import Job
from linearize.training.samples.conditioning import Conditioning
from linearize.training.samples.folder import TeacherSamples
from linearize.training.samples.writer import Request, SamplesWriter
from linearize.training.transfer.transfer import Transfer

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "training" / "worker.py"
SIZE = (1, 16, 8, 12)
PLANS = [
    {"format": "linearize/plan/1", "host": "flux", "default": spec, "sites": {}}
    for spec in ({"kind": "linear", "feature_map": "hedgehog"}, {"kind": "hybrid", "rate": 3})
]
RECIPE = {"updates": 4, "held_out": 1, "output_draws": 0, "queries": 8, "warmup": 1}


@pytest.fixture(scope="module")
def lab(comfy, tmp_path_factory):
    """A folder with the tiny FLUX's samples and a function that writes a job there; the model itself."""
    import folder_paths

    from linearize.patching.patcher import model_fingerprint

    folder = tmp_path_factory.mktemp("worker")
    name = "linearize_tiny_flux.safetensors"
    with torch.inference_mode():
        (model,) = comfy.nodes.UNETLoader().load_unet(name, "default")
    settings = about(fingerprint=model_fingerprint(model), latent_shape=SIZE, cfg=1.0, seeds=1, base_model=name)
    with SamplesWriter(folder / "samples", settings) as writer:
        for each in writer.missing([Request(number, f"prompt {number}") for number in range(6)]):
            pooled = {"pooled_output": noise(each.number, 1, 32)}
            positive = writer.put(Conditioning(noise(each.number, 1, 12, 64), pooled, {}))
            writer.add(each.number, each.prompt, noise(100 + each.number, *SIZE), positive, None)

    def job(output, **changes):
        data = {"format": "linearize/training/1", "stage": "transfer", "samples": "samples", "plans": PLANS,
                "model": {"file": folder_paths.get_full_path("diffusion_models", name), "kind": "diffusion_model"},
                "recipe": RECIPE, "output": output}  # fmt: skip
        data |= changes
        path = folder / f"{output.split('.')[0]}.json"
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
        return path

    job.folder, job.model = folder, model
    return job


def environment(**more):
    """Return the environment of a child: the pack's own folder is not on its path."""
    import comfy.cli_args

    root = Path(comfy.cli_args.__file__).resolve().parents[1]
    return {**os.environ, "LINEARIZE_COMFYUI": str(root), "OMP_NUM_THREADS": "1", **more}


def result_line(folder):
    return json.loads((folder / "progress.jsonl").read_text().splitlines()[-1])


def test_two_processes_of_the_worker_equal_one_that_averages(lab):
    from linearize.training.comfyui.teacher import with_teacher

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*launch, str(WORKER), str(lab("two.safetensors"))], env=environment(), cwd=lab.folder,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("update 4 of 4") == 1, "the first process alone talks"
    assert "4 sites with several candidates" in run.stdout
    lines = [json.loads(line) for line in (lab.folder / "two.job" / "progress.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "update" in line]
    assert [line["update"] for line in updates] == [1, 2, 3, 4]
    assert lines[0] == {"status": "measuring on held-out sample 1 of 1"}, "the first process alone tells it, once"
    assert sum("status" in line for line in lines) == len(lines) - 5
    found = unpack(*read_values(Path(lines[-1]["result"])))
    assert [line["losses"]["loss"] for line in updates] == found.history["loss"]
    recipe = TransferRecipe(**RECIPE)

    def train(teacher):
        specs = [dict.fromkeys([s.id for s in teacher.sites], spec) for spec in (LinearSpec("hedgehog"), HybridSpec(3))]
        return alone(lambda workers: Transfer(teacher, specs, recipe, torch.device("cpu"), workers))

    expected = with_teacher(lab.model, TeacherSamples.open(lab.folder / "samples"), train)
    compared = 0
    for site, candidates in found.candidates.sites.items():
        for number, candidate in enumerate(candidates):
            for name, tensor in candidate.parameters.items():
                truth = expected[f"{site}.{number}.parameters.{name}"]
                assert torch.allclose(tensor, truth, rtol=1e-3, atol=1e-5), (site, number, name)
                compared += 1
    assert compared >= 4 * 2 * 2
    student = load_student(lab.folder / "two.safetensors")
    assert student.base_model == "linearize_tiny_flux.safetensors" and student.recipe["transfer"]["updates_done"] == 4


def test_a_signal_stops_it_after_an_update_and_it_goes_on(lab):
    path = lab("stopped.safetensors", plans=PLANS[:1], recipe={**RECIPE, "updates": 120})
    child = subprocess.Popen([sys.executable, str(WORKER), str(path)], env=environment(), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, cwd=lab.folder)  # fmt: skip
    lines = lab.folder / "stopped.job" / "progress.jsonl"
    while child.poll() is None and not (lines.exists() and lines.read_text().count('"update"') >= 2):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and "updates and saved; run the same command again to go on" in said, said
    assert not (lab.folder / "stopped.safetensors").exists()
    run = subprocess.run([sys.executable, "-m", "linearize.training", str(path)], env=environment(), cwd=lab.folder,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    updates = [line for line in map(json.loads, lines.read_text().splitlines()) if "update" in line]
    assert [line["update"] for line in updates] == list(range(1, 121))
    found = unpack(*read_values(Path(result_line(lab.folder / "stopped.job")["result"])))
    assert found.history["loss"] == [line["losses"]["loss"] for line in updates]
    assert load_student(lab.folder / "stopped.safetensors").plan.rules


def catches_sigterm(pid):
    """Return whether a process has a handler for SIGTERM."""
    text = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in text.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


MOMENTS = {
    "at its first line": lambda lines, seconds: True,
    "while it imports": lambda lines, seconds: seconds > 0.3,
    "before the updates": lambda lines, seconds: any("status" in line for line in lines),
    "after the updates": lambda lines, seconds: lines and lines[-1].get("status") and any("update" in x for x in lines),
    "when all is done": lambda lines, seconds: any("student" in line for line in lines),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell who catches a signal")
@pytest.mark.parametrize("command", [[str(WORKER)], ["-m", "linearize.training"]], ids=["worker", "module"])
def test_sigterm_ends_it_well_at_any_moment(lab, command):
    """One job, stopped at one moment after the other; it ends with all updates made once, and a student."""
    name = f"any_{'module' if '-m' in command else 'worker'}"
    path = lab(f"{name}.safetensors", plans=PLANS[:1], recipe={**RECIPE, "updates": 30, "held_out": 3})
    progress = lab.folder / f"{name}.job" / "progress.jsonl"

    def lines():
        text = progress.read_text() if progress.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    moments = MOMENTS if "-m" not in command else dict(list(MOMENTS.items())[:2])
    for moment, is_time in moments.items():
        before, saved = len(lines()), (lab.folder / f"{name}.safetensors").exists()
        with subprocess.Popen([sys.executable, *command, str(path)], env=environment(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, cwd=lab.folder) as child:  # fmt: skip
            while child.poll() is None and not catches_sigterm(child.pid):
                time.sleep(0.001)
            started = time.monotonic()
            while child.poll() is None and not is_time(lines()[before:], time.monotonic() - started):
                time.sleep(0.003)
            child.send_signal(signal.SIGTERM)
            said, _ = child.communicate(timeout=60)
        assert child.returncode == 0, (moment, child.returncode, said)
        assert "Traceback" not in said and "run the same command again to go on" in said or saved or (
            moment == "when all is done"), (moment, said)  # fmt: skip
    if "-m" not in command:
        assert load_student(lab.folder / f"{name}.safetensors").recipe["transfer"]["updates_done"] == 30
        updates = [line["update"] for line in lines() if "update" in line]
        assert updates == list(range(1, 31)), "what was done is not done again"


@pytest.fixture
def main(lab, capsys, monkeypatch):
    """The command in this process: returns its exit code and what it wrote to stderr."""
    import comfy.cli_args

    monkeypatch.setattr(command, "talk", lambda: None)
    monkeypatch.setenv("LINEARIZE_COMFYUI", str(Path(comfy.cli_args.__file__).resolve().parents[1]))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(path):
        capsys.readouterr()
        code = command.main([str(path)])
        return code, capsys.readouterr().err

    return run


def test_a_student_is_fine_tuned_without_the_server(main, lab):
    assert main(lab("first.safetensors", plans=PLANS[:1])) == (0, "")
    quick = {"block_updates": 1, "updates": 2, "rank": 2, "accumulation": 1, "held_out": 1, "ema": 0.0}
    job = lab("tuned", stage="finetune", plans=None, student="first.safetensors", recipe=quick)
    assert main(job) == (0, "")
    student = load_student(lab.folder / "tuned" / "student.safetensors")
    assert set(student.recipe) >= {"transfer"} and student.fingerprint is not None
    before = (lab.folder / "tuned" / "student.job" / "progress.jsonl").read_text().count("update")
    assert main(job) == (0, ""), "a finished job answers at once"
    assert (lab.folder / "tuned" / "student.job" / "progress.jsonl").read_text().count("update") == before


def test_a_loss_that_is_not_finite_ends_with_the_student_so_far(main, lab, monkeypatch):
    update = Transfer.update

    def spoilt(stage, number):
        if number == 2:
            raise NotFinite("single.0: the loss is nan at update 3")
        return update(stage, number)

    monkeypatch.setattr(Transfer, "update", spoilt)
    assert main(lab("ended.safetensors")) == (0, "")
    facts = load_student(lab.folder / "ended.safetensors").recipe["transfer"]
    assert facts["updates_done"] == 2 and facts["notes"] == ["single.0: the loss is nan at update 3"]
    assert Path(result_line(lab.folder / "ended.job")["result"]).is_file(), "it is over"


OTHER_HOST = {**PLANS[0], "host": "wan"}
BAD = {
    "no stage": ({"stage": None}, "a job has no key stage"),
    "unknown stage": ({"stage": "polish"}, "stage is one of transfer, finetune, got 'polish'"),
    "unknown key": ({"gpus": 2}, "a job has no key gpus; it may have format, stage"),
    "format": ({"format": "linearize/training/2"}, "this reads format linearize/training/1, got"),
    "no model file": ({"model": {"file": "nowhere.safetensors"}}, "there is no model file"),
    "no model": ({"model": "x"}, "model is a JSON object, got str"),
    "model kind": ({"model": {"file": "samples", "kind": "gguf"}}, "kind of the model is one of diffusion_model"),
    "recipe key": ({"recipe": {"update": 3}}, "the recipe of stage transfer has no key update; it may have"),
    "recipe stage": ({"recipe": {"stage": "finetune"}}, "the recipe is of stage 'finetune', the job of stage transfer"),
    "recipe value": ({"recipe": {"updates": -1}}, "updates is a whole number of at least 0, got -1"),
    "both": ({"student": "x.safetensors"}, "a job of stage transfer has the key plans and no key student"),
    "no student": ({"stage": "finetune"}, "a job of stage finetune has the key student and no key plans"),
    "no plans": ({"plans": []}, "plans is a list of at least one linearize/plan/1 object"),
    "no samples": ({"samples": "elsewhere"}, "there are no teacher samples in"),
    "no ComfyUI": ({"comfyui": "samples"}, "there is no ComfyUI in"),
    "host": ({"plans": [OTHER_HOST]}, "the plan is for host wan, this model is flux"),
    "device": ({"device": "tpu"}, "device is one of auto, cpu, got 'tpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(main, lab, name):
    changes, sentence = BAD[name]
    code, said = main(lab(f"bad_{list(BAD).index(name)}.safetensors", **changes))
    assert code == 1 and sentence in said and said.count("\n") == 1, said


def test_files_that_are_none_are_one_sentence(main, lab, monkeypatch):
    torn = lab.folder / "torn.json"
    torn.write_text("{")
    (long := lab.folder / "long.json").write_text(" " * (MOST_BYTES + 1))
    for path, sentence in ((torn, "is not JSON"), (long, "long.json has more than"),
                           (lab.folder / "none.json", "cannot be read: No such file")):  # fmt: skip
        code, said = main(path)
        assert code == 1 and sentence in said and said.count("\n") == 1
    code, said = main(lab("wrong.safetensors", model={"file": str(torn)}))
    assert code == 1 and "ComfyUI cannot load" in said and said.count("\n") == 1, said
    other = lab("other.safetensors")
    monkeypatch.setattr("linearize.training.comfyui.model.model_fingerprint", lambda _: torch.full((256,), 9.0))
    code, said = main(other)
    assert code == 1 and "are of another model" in said and said.count("\n") == 1


def test_the_command_itself_ends_without_a_traceback(lab):
    run = subprocess.run([sys.executable, "-m", "linearize.training", str(lab("x.safetensors", stage="polish"))],
                         env=environment(), cwd=lab.folder, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert command.main([]) == 2 and command.main(["--help"]) == 0


def test_nothing_at_the_end_of_a_process_undoes_its_work():
    """A thread of the process group aborted processes whose student was saved, about one time in ten."""
    code = f"""import atexit, os, sys; sys.path.insert(0, {str(WORKER.parent)!r}); import worker
atexit.register(os.abort); print("saved"); worker.leave(0)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "saved\n")


@pytest.mark.parametrize("reader", ["there", "gone"])
def test_an_exception_that_nobody_expected_undoes_nothing_either(reader):
    """A traceback and exit code 1, without the destructors, and though nobody reads what is written."""
    gone = "from types import SimpleNamespace; sys.stdout = SimpleNamespace(flush=lambda: open('/nowhere/x'))"
    code = f"""import atexit, os, sys; sys.path.insert(0, {str(WORKER.parent)!r}); import worker
worker.name_pack()
import linearize.training.__main__ as command
command.main = lambda arguments: arguments[7]
{gone if reader == "gone" else ""}
atexit.register(os.abort); worker.work(["job.json"])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.endswith("IndexError: list index out of range\n"), run.stderr


def test_files_of_one_model_in_other_types_are_other_jobs(lab, comfy):
    """Their norms, which the fingerprint is made of, are the same."""
    from linearize.training.comfyui.identity import earlier_job_digests, job_digest

    with torch.inference_mode():
        models = [comfy.nodes.UNETLoader().load_unet("linearize_tiny_flux.safetensors", each)[0]
                  for each in ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast")]  # fmt: skip
    default, fp8, fast = map(job_digest, models)
    assert len({default, fp8, fast}) == 3 and fp8 in earlier_job_digests(models[2])


@pytest.mark.parametrize("started_by", ["command", "node"])
@pytest.mark.parametrize("known_by", ["weights", "norms"])
def test_a_job_of_an_earlier_version_goes_on(lab, monkeypatch, started_by, known_by):
    """The worker described its jobs in its own way; with nodes they lay in a folder inside the node's job."""
    from linearize.training.comfyui import model, worker

    name = f"{started_by}_{known_by}"
    job = read_job(lab(f"{name}.safetensors", plans=PLANS[:1]))
    worker.train(job, ProcessGroup())
    (folder,) = [path for path in job.folder.iterdir() if path.is_dir()]
    subject, samples = model.ComfyModel(lab.model), TeacherSamples.open(job.samples)
    by_weights, by_norms = worker.earlier_folders(job, subject, samples, None, 1)
    earlier, root = by_weights if known_by == "weights" else by_norms, lab.folder / "jobs"
    folder.rename(earlier)
    for path in earlier.glob("*.safetensors"):  # they name the job as it was named
        tensors, values = read_values(path)
        with JobFolder(lab.folder / "other", {}) as other:
            monkeypatch.setattr(other, "path", earlier)
            other._write(path.name, tensors, values)
    (earlier / "mark").touch()
    with monkeypatch.context() as patch:
        patch.setattr(model, "with_teacher", lambda *_: pytest.fail("it was trained anew"))
        if started_by == "node":
            made = Job(root, job.recipe, job.plans).describe("flux", subject.digest, samples.digest)
            with JobFolder(root, made):
                pass
        worker.train(job, ProcessGroup(), root if started_by == "node" else None)
    if started_by == "node":
        (folder,) = root.iterdir()
    assert (folder / "result.safetensors").is_file() and (folder / "mark").exists() == (started_by == "command")
    assert earlier.exists() == (started_by == "node"), "nothing is lost"
    with JobFolder(folder.parent, {k: v for k, v in json.loads((folder / "job.json").read_text()).items()
                                   if k != "format"}) as again:  # fmt: skip
        assert again.result() is not None and again.state() is not None and not again.notes


def test_a_job_is_read_as_it_was_written(lab, tmp_path):
    job = read_job(lab("again.safetensors"))
    assert job.samples == lab.folder / "samples" and job.folder == lab.folder / "again.job"
    job.write(tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == job
    (tmp_path / "student.safetensors").touch()
    data = {**job.to_json(), "stage": "finetune", "student": "student.safetensors", "recipe": {"rank": 8}}
    tuned = job_from_json({key: value for key, value in data.items() if key != "plans"}, tmp_path)
    assert tuned.recipe == FinetuneRecipe(rank=8) and tuned.student == tmp_path / "student.safetensors"
    assert job_from_json(tuned.to_json(), Path("unused")) == tuned


def test_progress_is_read_line_by_line(tmp_path):
    ProgressFile(tmp_path).add({"update": 0})
    reader, file = ProgressReader(tmp_path), ProgressFile(tmp_path)
    file.add({"update": 1})
    with file.path.open("a") as torn:
        torn.write('{"upd')
    assert reader.new() == [{"update": 1}] and reader.new() == []
    with file.path.open("a") as rest:
        rest.write('ate": 2}\n')
    assert reader.new() == [{"update": 2}]
    assert ProgressReader(tmp_path / "later").new() == []
