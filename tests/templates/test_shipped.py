"""The pack's own templates with Foveated Attention: as shipped, every site of every model runs it, in every step."""

import json
from pathlib import Path

import pytest
from template_prompts import Template

FOLDER = Path(__file__).resolve().parents[2] / "workflows" / "api"
TEMPLATES = sorted(FOLDER.glob("*_foveated.json"))


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def template(request, descriptions):
    return Template(json.loads(request.param.read_text(encoding="utf-8")), descriptions)


def test_every_site_is_foveated(template, execute):
    for node in template.prompt.values():
        if node["class_type"] == "LinearizeFoveated":
            node["inputs"]["min_tokens"] = 0  # tiny sizes pay nowhere
    (run,) = template.runs()
    sampled = execute(run)
    assert len(sampled) == len(run.samplers)
    for record, planned in sampled:
        ran = {(each.site, each.kind, each.backend) for each in record.ran}
        assert ran == {(site, "foveated", "torch") for site in planned}, record.summary()
        assert len(set(record.ran.values())) == 1, "as often as every other"
        assert not record.declined and not record.skipped and not record.non_finite, record.summary()


def test_the_node_is_as_it_comes(template):
    """What a template shows is what the node does by itself, so that nobody has to copy a setting."""
    nodes = [node["inputs"] for node in template.prompt.values() if node["class_type"] == "LinearizeFoveated"]
    defaults = template.defaults("LinearizeFoveated")
    assert nodes and defaults["keep"] == 0.15
    for inputs in nodes:
        assert {name: value for name, value in inputs.items() if name != "model"} == {**defaults, "backend": "auto"}


def test_every_template_is_here():
    assert {"qwen_image", "z_image", "flux2", "flux_kontext", "wan22_i2v", "hunyuan_video"} <= {
        path.stem.removesuffix("_foveated") for path in TEMPLATES
    }
