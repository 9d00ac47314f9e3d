"""The distillation demo, without a server: what it says where fine-tuning gave back what it got."""

import importlib
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture
def demo(monkeypatch):
    """The demo's module."""
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("run_distill")


def test_a_student_that_was_given_back_is_a_sentence(demo, monkeypatch):
    facts = {"error_before": 0.2, "error_after": 0.1}
    recipe = {"transfer": {}, "finetune": facts}
    monkeypatch.setattr(demo, "recipe_of", lambda name: recipe)
    assert demo.tuned("lake/clear_00001_.safetensors") == facts
    facts["error_after"] = None
    with pytest.raises(demo.ServerProblem, match="could not be measured, because values there are infinite"):
        demo.tuned("lake/clear_00001_.safetensors")
    del recipe["finetune"]
    with pytest.raises(demo.ServerProblem, match=r"gave lake/clear_00001_.safetensors back .* error rose; lower"):
        demo.tuned("lake/clear_00001_.safetensors")
