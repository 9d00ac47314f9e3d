"""The whole chain of distillation through a live server: samples, transfer, budget, fine-tuning, file, reload."""

import re

import pytest

from linearize.lab.comfyui import BASE
from linearize.lab.demo import run_distill
from linearize.lab.demo.distill_chain import CLIPS, LAKE
from linearize.lab.demo.readings import measures_of, picture_of, receipt_of

STUDENT = "lake/server_test"


@pytest.fixture(scope="module", autouse=True)
def clean():
    """No student of an earlier run."""
    for path in (BASE / "models" / "linearize").glob(f"{STUDENT}_*.safetensors"):
        path.unlink()


def quick(workflow):
    """Return a workflow of the demo with few samples and updates."""
    for node in workflow.values():
        inputs = node["inputs"]
        if node["class_type"] == "LinearizeTeacherSamples":
            inputs.update(name=f"{inputs['name']}_test", steps=4, prompts="\n".join(inputs["prompts"].splitlines()[:6]))
        if node["class_type"] == "LinearizeTransfer":
            inputs.update(updates=min(inputs["updates"], 12), output_draws=min(inputs["output_draws"], 16), held_out=2)
        if node["class_type"] == "LinearizeFinetune":
            inputs.update(updates=2, block_updates=1, held_out=2)
        if node["class_type"] == "LinearizeSaveStudent":
            inputs["name"] = STUDENT
        if node["class_type"] == "KSampler":
            inputs["steps"] = 3
    return workflow


@pytest.mark.parametrize("chain", [CLIPS, LAKE], ids=lambda chain: chain.model)
def test_a_student_that_was_saved_paints_what_the_one_in_memory_painted(server, chain):
    """Hybrid attention: the file is loaded by name, every site runs it, and the picture is the same."""
    workflow = quick(chain.of_kind("hybrid"))
    outputs, _ = server.measure(workflow)
    name = run_distill.saved_file(workflow)
    facts = run_distill.recipe_of(name)["transfer"]
    assert facts["updates_done"] == 12 and facts["error_after"] < facts["error_before"]
    again, _ = server.measure(quick(chain.reloaded(name)))
    receipt_of(picture_of(server, again["PreviewImage"]["images"][0]), "hybrid", chain.sites)
    assert measures_of(again) == measures_of(outputs)


def test_a_finished_job_answers_at_once(server, output):
    """The same graph with another seed of the sampler: samples and training come from their folders."""
    workflow = quick(LAKE.of_kind("hybrid"))
    for node in workflow.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] += 1
    jobs = sorted((output / "linearize" / "jobs").glob("*/result.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in jobs]
    server.measure(workflow)
    assert jobs and [path.stat().st_mtime_ns for path in jobs] == stamps


@pytest.mark.parametrize("chain", [CLIPS, LAKE], ids=lambda chain: chain.model)
def test_the_shipped_workflow_mixes_kinds_under_its_budget(server, chain):
    outputs, _ = server.measure(quick(chain.shipped()))
    assert measures_of(outputs)[0] > 0 and outputs["PreviewImage"]["images"]
    ran = outputs["LinearizeReport"]["text"][0].partition("\n\nplanned:")[0]
    assert re.match(r"TRAINED · \d+ % of attention.* · \d of \d sites", ran), ran


def test_mistakes_are_one_sentence(live, server):
    workflow = quick(LAKE.shipped())
    workflow["9"]["inputs"]["budget"] = 0.001
    with pytest.raises(live.ServerProblem, match="a budget of 0.001 cannot be reached"):
        server.measure(workflow)
    workflow = quick(LAKE.of_kind("linear"))
    workflow["4"]["inputs"]["prompts"] = "# nothing\n\n"
    with pytest.raises(live.ServerProblem, match="LinearizeTeacherSamples: .*prompt"):
        server.measure(workflow)
    workflow = quick(LAKE.of_kind("linear"))
    workflow["8"]["inputs"]["model"] = ["12", 0]
    workflow["12"]["inputs"]["attention"] = ["5", 0]
    with pytest.raises(live.ServerProblem, match="linearized already"):
        server.measure(workflow)
