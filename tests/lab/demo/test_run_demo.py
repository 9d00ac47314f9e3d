"""The demo without a server: each variant is a shipped workflow, and the sheets show what their columns say."""

import pytest
from PIL import Image

from linearize.lab.demo import run_demo
from linearize.lab.demo.run_demo import CAPTIONS, CELL, CLEAR, DENSE, FOVEATED, LINE, VARIANTS, shipped, workflow_for

NODES = {FOVEATED.node, CLEAR.node}


def classes(workflow):
    return {node["class_type"] for node in workflow.values()}


def test_titles_say_what_is_shipped():
    assert [variant.title for variant in VARIANTS] == ["dense", "foveated, keep 0.15", "clear, radius 8"]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.kind)
def test_variants_differ_in_their_attention_node_alone(variant):
    """The same caption, seed, size and sampler; dense samples with what the loader gives."""
    workflow = workflow_for(variant, "caption", size=640, steps=3, seed=7)
    assert classes(workflow) & NODES == ({variant.node} if variant.node else set())
    others = {key: node for key, node in workflow.items() if node["class_type"] not in NODES}
    (source,) = (key for key, node in workflow.items() if node["class_type"] == (variant.node or "UNETLoader"))
    (sampler,) = (node["inputs"] for node in others.values() if node["class_type"] == "KSampler")
    assert sampler["model"] == [source, 0] and (sampler["seed"], sampler["steps"]) == (7, 3)
    same = workflow_for(DENSE, "caption", size=640, steps=3, seed=7)
    for key, node in others.items():
        inputs = {name: value for name, value in node["inputs"].items() if name != "model"}
        assert inputs == {name: value for name, value in same[key]["inputs"].items() if name != "model"}
    assert {node["inputs"]["caption"] for node in others.values() if "caption" in node["inputs"]} == {"caption"}


@pytest.mark.parametrize("variant", [FOVEATED, CLEAR], ids=lambda variant: variant.kind)
def test_the_attention_node_is_as_shipped(variant):
    (node,) = (node for node in workflow_for(variant, "caption").values() if node["class_type"] == variant.node)
    assert node in shipped(variant.kind).values()


def test_sheets_have_a_column_per_title_and_the_front_page_the_variants_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(run_demo, "OUTPUT", tmp_path)
    colours = {
        "dense": "red",
        "foveated, keep 0.15": "green",
        "clear, radius 8": "blue",
        "clear: difference x 8": "black",
    }
    run_demo.save_pictures({title: [Image.new("RGB", (8, 8), colour)] * len(CAPTIONS)
                            for title, colour in colours.items()})  # fmt: skip
    assert (tmp_path / "foveated_keep_0.15_3.png").exists() and (tmp_path / "clear_difference_x_8_1.png").exists()
    for name, num_columns, num_rows in (("sheet", 4, len(CAPTIONS)), ("front", 3, run_demo.FRONT_ROWS)):
        drawn = Image.open(tmp_path / f"{name}.png")
        assert drawn.size == (CELL * num_columns, (CELL + LINE) * num_rows + LINE)
        for row in range(num_rows):
            middles = [
                (column * CELL + CELL // 2, LINE + row * (CELL + LINE) + CELL // 2) for column in range(num_columns)
            ]
            expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours.values()][:num_columns]
            assert [drawn.getpixel(middle) for middle in middles] == expected
