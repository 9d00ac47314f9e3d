"""The distillation demo, without a server: what it says where fine-tuning gave back what it got."""

import pytest

from linearize.lab.demo import run_distill
from linearize.lab.server import ServerProblem


def test_a_student_that_was_given_back_is_a_sentence(monkeypatch):
    facts = {"error_before": 0.2, "error_after": 0.1}
    recipe = {"transfer": {}, "finetune": facts}
    monkeypatch.setattr(run_distill, "recipe_of", lambda name: recipe)
    assert run_distill.tuned("lake/clear_00001_.safetensors") == facts
    facts["error_after"] = None
    with pytest.raises(ServerProblem, match="could not be measured, because values there are infinite"):
        run_distill.tuned("lake/clear_00001_.safetensors")
    del recipe["finetune"]
    with pytest.raises(ServerProblem, match=r"gave lake/clear_00001_.safetensors back .* error rose; lower"):
        run_distill.tuned("lake/clear_00001_.safetensors")
