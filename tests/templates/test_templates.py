"""Official templates with CLEAR behind every loader of a model: all sites run on windows.

Every template that samples a diffusion transformer of a served family for pictures or video with ComfyUI's own nodes
is here. A model file that no family knows, or a template that stays dense and is not listed, is a failure.
"""

import importlib.metadata
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from template_prompts import served_templates

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "docs" / "templates.json"  # what docs/hosts.md tells
PACKAGE = "comfyui-workflow-templates-json"


@dataclass(frozen=True)
class Dense:
    """A template that stays dense.

    Args:
        code: of the reason; "" where no attention call reaches the override.
        why: words of what the node says.
        reader: the same for readers of docs/hosts.md.
    """

    code: str
    why: str
    reader: str


BESIDE = Dense("references", "beside the latent", "HiDream-E1 puts the picture to edit beside the latent")
SPLIT = Dense("split", "splits this self-attention", "guides of a strength below 1 split the attention of LTX-2")
FRAMES = Dense("", "no attention call reached", "the causal Wan runs frame by frame, outside of what can be patched")
DENSE = {
    "hidream_e1_1": BESIDE,
    "hidream_e1_full": BESIDE,
    "template_ltx2_3_style_transition": SPLIT,
    "video_ltx2_3_flf2v": SPLIT,
    "video_causal_forcing_i2v": FRAMES,
}
# the guider runs its second model with the options of the first, so the first node's record has the calls of both
TWO_MODELS = ("image_ideogram4_t2i", "image_ideogram4_t2i_int8")
NAMES = served_templates()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DENSE])
def test_every_site_runs_on_windows(name, templates, execute):
    runs = templates[name].runs()
    assert runs
    for run in runs:
        sampled = execute(run)
        assert sampled  # samplers that are given the same are run once
        if name in TWO_MODELS:
            (first, _), (second, _) = sampled
            assert set(first.ran.values()) == {4} and not second.ran  # two steps of two models
            sampled.pop()
        for record, planned in sampled:
            ran = {(each.site, each.kind, each.backend) for each in record.ran}
            assert ran == {(site, "clear", "torch") for site in planned}, record.summary()
            assert not record.declined and not record.skipped and not record.non_finite, record.summary()


@pytest.mark.parametrize("name", DENSE)
def test_what_stays_dense_says_why(name, core, templates, execute):
    expect_declines = core.module("attention.runtime.runtime").expect_declines
    for run in templates[name].runs():
        with expect_declines(DENSE[name].code):
            sampled = execute(run)
        assert sampled
        for record, _ in sampled:
            assert DENSE[name].why in record.summary()
            assert record.declined if DENSE[name].code else not record.ran


def test_readme_counts_today_s_templates(core, templates, models):
    """`python -m lab.benchmarks.tables --templates` takes over what this writes."""
    assert [name for name, template in templates.items() if template.runs()] == NAMES
    version = importlib.metadata.version(PACKAGE)
    if f"{PACKAGE}=={version}" not in (ROOT / "run.py").read_text(encoding="utf-8"):
        pytest.skip(f"docs/hosts.md counts the templates that run.py installs, and these are of {version}")
    find_host = core.module("attention.hosts").find_host
    totals, running = Counter(), Counter()
    for name in NAMES:
        for title in {find_host(models(run.family).diffusion_model).title for run in templates[name].runs()}:
            totals[title] += 1
            running[title] += name not in DENSE
    found = {
        "package": f"{PACKAGE} {version}",
        "hosts": {title: [running[title], totals[title]] for title in sorted(totals)},
        "templates": [len(NAMES) - len(DENSE), len(NAMES)],
        "dense": {name: dense.reader for name, dense in sorted(DENSE.items())},
    }
    (ROOT / ".comfyui" / "templates.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert stored == found, "run: python -m lab.benchmarks.tables --templates"
