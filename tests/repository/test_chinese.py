"""The Chinese texts use one word per term, those of docs/chinese.md."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    ROOT / "README.zh.md",
    *sorted((ROOT / "locales" / "zh").glob("*.json")),
    *sorted((ROOT / "web").rglob("zh.md")),
]


def glossary():
    """Return (term, Chinese, words not to use) of the table."""
    table = (ROOT / "docs" / "chinese.md").read_text(encoding="utf-8").split("table:chinese -->")[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [(term, word, others.split()) for term, word, others in rows[2:]]


def test_the_table_names_each_word_once():
    words = [word for _, word, _ in glossary()]
    assert len(words) == len(set(words)) >= 15
    assert not set(words) & {other for _, _, others in glossary() for other in others}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_text_uses_another_word(path):
    text = path.read_text(encoding="utf-8")
    assert [other for _, _, others in glossary() for other in others if other in text] == []


def test_every_word_is_used():
    texts = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    assert [word for _, word, _ in glossary() if word not in texts] == []
