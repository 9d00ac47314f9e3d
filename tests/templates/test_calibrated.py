"""Calibrate Attention before the samplers of official templates, one of each family: what was measured then runs."""

import copy
import itertools
import shutil
from pathlib import Path

import pytest
from template_prompts import Run, is_link, served_templates
from test_templates import DENSE, TWO_MODELS

SPECS = "clear 2, foveated 0.4"
FIRST_STEP = "image_flux2_klein_9b_kv_image_edit"  # later steps take the keys of references from a cache
GUIDERS = {"BasicGuider": ("conditioning", None), "CFGGuider": ("positive", "negative")}


@pytest.fixture(autouse=True)
def measured(core, monkeypatch, tmp_path):
    """Dense calls take 1 s, and candidates less, so that all sites are worth a choice; nothing is remembered."""
    import folder_paths

    answers = itertools.cycle([1.0, 0.3, 0.2])

    def call_seconds(device, compute, **_):
        compute()
        return next(answers)

    monkeypatch.setattr(core.module("attention.calibration.watch"), "call_seconds", call_seconds)
    module = core.module("patching.calibrate")
    choose = module.choose
    monkeypatch.setattr(module, "choose", lambda *given: choose(*given[:4]))  # steps of a tiny model gain nothing
    monkeypatch.setattr(folder_paths, "get_system_user_directory", lambda name: str(tmp_path / name))
    folder = Path(folder_paths.get_folder_paths("linearize")[0]) / "plans"
    yield
    shutil.rmtree(folder, ignore_errors=True)


def sampled_by(prompt, sampler):
    """Return (node with the model, positive, negative, latent) of a sampler, as links, or None for another guider."""
    inputs = prompt[sampler]["inputs"]
    if not is_link(inputs.get("guider")):
        return sampler, inputs["positive"], inputs.get("negative"), inputs["latent_image"]
    guider = inputs["guider"][0]
    names = GUIDERS.get(prompt[guider]["class_type"])
    if names is None:
        return None
    positive, negative = names
    own = prompt[guider]["inputs"]
    return guider, own[positive], own.get(negative) if negative else None, inputs["latent_image"]


def calibrated(run):
    """Return a run whose first sampler gets a calibrated model, None where that cannot be put in."""
    prompt, (sampler, *_) = copy.deepcopy(run.prompt), run.samplers
    found = sampled_by(prompt, sampler)
    if found is None:
        return None
    place, positive, negative, latent = found
    inputs = {
        "model": prompt[place]["inputs"]["model"], "positive": positive, "latent_image": latent,
        "target": "least error", "target.time_share": 0.5, "steps": 4, "candidates": SPECS, "checks": 1, "again": True,
    }  # fmt: skip
    cfg = prompt[place]["inputs"].get("cfg", 1.0)
    if negative is not None and cfg != 1:  # at 1 a negative prompt may lack what the model needs
        inputs |= {"negative": negative, "cfg": cfg}
    prompt["calibrate"] = {"class_type": "LinearizeCalibrate", "inputs": inputs}
    prompt[place]["inputs"]["model"] = ["calibrate", 0]
    return Run(run.family, prompt, (sampler,))


def one_of_each_family(templates):
    """Yield (name, run) of the first template of each family whose sampler can be given a calibrated model."""
    known = set()
    for name in served_templates():
        if name in (*DENSE, *TWO_MODELS, FIRST_STEP):
            continue
        for run in templates[name].runs():
            changed = calibrated(run) if run.family.files not in known else None
            if changed is not None:
                known.add(run.family.files)
                yield name, changed


def test_what_was_chosen_runs_on_every_family(templates, execute):
    tried, wrong = [], []
    for name, run in one_of_each_family(templates):
        sampled = [(record, planned) for record, planned in execute(run) if record.sampled and planned]
        record, planned = sampled[-1]
        tried.append(name)
        kinds, sites = {each.kind for each in record.ran}, {each.site for each in record.ran}
        if not kinds & {"clear", "foveated"} or sites != set(planned) or record.declined or record.non_finite:
            wrong.append(f"{name}: {record.summary()}")
    assert not wrong, "\n".join(wrong)
    assert len(tried) >= 20, tried


def test_a_model_that_attends_in_its_first_step_only_stays_dense_and_says_so(core, templates, execute, monkeypatch):
    told = []
    status = core.module("nodes.node_status")
    monkeypatch.setattr(status, "_tell", lambda node, text, failed: told.append((node, text)))
    execute(calibrated(templates[FIRST_STEP].runs()[0]))
    (text,) = {text for node, text in told if node == "calibrate" and "not measured" in text and "measured 20" in text}
    assert text.startswith("DENSE · ") and "called in the first step only" in text
