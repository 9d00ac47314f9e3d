"""Calibrate Attention on the demo's model through a real server: measured once, remembered, cancelled, gone on."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from listening import events

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "lab" / "demo" / "api" / "calibrate_demo.json"
NODE, SAMPLER, REPORT = "4", "7", "10"


def demo(seed, **changed):
    """Return the shipped graph with few steps behind the node; a new seed, or the server's cache answers."""
    workflow = json.loads(DEMO.read_text(encoding="utf-8"))
    workflow[SAMPLER]["inputs"].update(steps=2, seed=seed)
    workflow[NODE]["inputs"].update({"checks": 2, **changed})
    return workflow


def interrupt(server):
    request = urllib.request.Request(f"{server.url}/interrupt", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        pass


def followed(server, workflow, at=None):
    """Return what the node told, and how the prompt ended; interrupt it once the node told `at`."""
    told, end = [], ""
    for kind, data in events(server, workflow):
        end = kind
        if kind == "linearize.status" and data["node"] == NODE:
            told.append(data["text"])
            if at and at in data["text"]:
                interrupt(server)
    return told, end


@pytest.fixture(scope="module")
def measured(server):
    """What the node told while it measured, and how that ended."""
    return followed(server, demo(1, again=True))


def test_it_says_how_long_it_takes_and_what_came_out(measured):
    told, end = measured
    assert end == "execution_success"
    steps = [text for text in told if text.startswith("calibrating: step")]
    assert len(steps) == 8 and "about as long as 20 steps" in steps[0] and "s left" in steps[-1]
    came_out = next(text for text in told if text.startswith("CALIBRATED"))
    words = r"CALIBRATED · [\d.]+ s a step, dense [\d.]+ · \d+ % of attention's time · error 0\.00\d+\n"
    assert re.match(words, came_out), came_out
    assert "foveated" in came_out and "measured 20" in came_out and "1024 x 1024 pixels" in came_out
    assert told[-1].startswith("UNTRAINED · "), "the sampler's run is told on the node too"
    assert "CALIBRATED · " in told[-1] and "measured 20" in told[-1]


def test_the_next_run_remembers_and_the_report_shows_it(server, measured):
    told, end = followed(server, demo(2))
    assert end == "execution_success" and not any("step" in text.split("·")[0] for text in told[:1])
    assert "remembered" in told[0]
    outputs = server.run(demo(3))
    text = outputs[REPORT]["text"][0]
    assert text.startswith("UNTRAINED · ") and "attention of 5 sites" in text and "measured 20" in text
    assert outputs["11"]["images"], "the map is there"


def test_a_cancelled_run_ends_the_prompt_and_goes_on(server, measured):
    told, end = followed(server, demo(4, again=True, steps=6), at="step 3 of 6")
    assert end == "execution_interrupted"
    assert not any(text.startswith(("CALIBRATED", "UNTRAINED")) for text in told)
    told, end = followed(server, demo(5, again=True, steps=6))
    assert end == "execution_success" and re.match(r"calibrating: going on after step [345] of 6", told[0]), told[0]
    assert any(text.startswith("CALIBRATED") for text in told)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"candidates": "clear 8, quick 9"}, "cannot read the candidate"),
        ({"cfg": 2.0}, "needs a negative prompt"),
        ({"target": "nobody"}, "target is least time or least error"),
    ],
)
def test_wrong_input_is_a_sentence(server, live, changed, words):
    with pytest.raises(live.ServerProblem, match=words):
        server.run(demo(6, **changed))


def test_a_kind_that_there_is_not_is_a_sentence_too(server, live):
    plan = {"class_type": "LinearizeUniformPlan", "inputs": {"kind": "nobody", "sites": "all", "host": "auto"}}
    apply = {"class_type": "LinearizeApply", "inputs": {"model": ["1", 0], "attention": ["20", 0]}}
    report = {"class_type": "LinearizeReport", "inputs": {"model": ["21", 0], "width": 512, "height": 512}}
    workflow = {"1": demo(7)["1"], "20": plan, "21": apply, "22": report}
    with pytest.raises(live.ServerProblem, match="kind is one of chunked, clear, dense, foveated"):
        server.run(workflow)
