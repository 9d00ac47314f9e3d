"""Words that people search for find a node of ours, in English and in Chinese; the node list says experimental."""

import json
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
WORDS = [
    "sparse attention", "accelerate", "speed up", "memory", "sage", "wan", "video", "加速", "稀疏", "窗口",
    "linear attention", "faster", "high resolution", "distill", "蒸馏",
]  # fmt: skip


def searched(comfy):
    """Return, per node, what the frontend's search looks at: id, names in both languages, aliases."""
    names = {
        language: json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for language in ("en", "zh")
    }
    found = {}
    for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if name in names["en"]:
            schema = cls.GET_SCHEMA()
            shown = [each[name].get("display_name", "") for each in names.values()]
            found[name] = " ".join([name, schema.display_name, *shown, *schema.search_aliases]).lower()
    return found


@pytest.mark.parametrize("word", WORDS)
def test_a_word_finds_a_node(comfy, word):
    assert [name for name, text in searched(comfy).items() if word in text], word


def test_what_speeds_sampling_up_comes_by_the_common_words(comfy):
    texts = searched(comfy)
    for word in ("sparse attention", "accelerate", "speed up", "memory", "sage", "加速", "稀疏"):
        assert {"LinearizeFoveated", "LinearizeCLEAR"} <= {name for name, text in texts.items() if word in text}, word


def test_every_node_is_called_experimental(comfy):
    """Until a GPU and a released model were measured."""
    for name in searched(comfy):
        assert comfy.nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA().is_experimental, name
