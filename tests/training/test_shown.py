"""Hostile texts of files through every door to a person: node, sentence, log and card."""

import json
import logging
import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from linearize.attention.hub.model_card import describe_student, model_card
from linearize.attention.hub.transfer import HubFile
from linearize.attention.plans import Plan, select_sites
from linearize.attention.runtime.record import Once
from linearize.attention.shown import LONGEST, one_line, printable, quote, quote_some
from linearize.attention.spec_json import spec_from_json
from linearize.attention.specs import ClearSpec
from linearize.attention.students.file import StudentFile, load_student, save_student
from linearize.attention.students.fit import check_student
from linearize.attention.students.tensor_file import open_tensor_file, problem, write_tensor_file
from linearize.training.jobs.description import job_from_json
from linearize.training.samples.folder import check_samples
from linearize.training.samples.index import About, read_about

HOSTILE = (
    "two\nlines", "\r\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\u2028next", "a\x00b\x7f\x85", "\ud83d", "\u200bzero",
    "x" * 5000, "</td><script>alert(1)</script>", "a | b [c](http://evil.example) ![d](e)", "`code` ~~~ **b** # h",
    "---\nlicense: mit\n---", "www.evil.example @someone http://evil.example &lt;b&gt;", "{}: &a *b !!python/none",
)  # fmt: skip
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=300)


def is_shown_well(text, most=1200):
    assert text.isprintable() and len(text) <= most, text[:200]


@given(TEXTS)
def test_what_is_shown_is_one_printable_line_of_bounded_length(text):
    for shown in (one_line(text), quote(text), quote([text]), quote({text: text}), one_line({"a": text})):
        assert shown.isprintable() and len(shown) <= LONGEST + len("...")
    assert printable(text).isprintable()
    assert not text.isprintable() or printable(text) == text


def test_only_what_is_too_long_is_cut():
    for length, shown in ((7, "a" * 7), (8, "a" * 8), (9, "a" * 8 + "...")):
        assert one_line("a" * length, 8) == shown
    for length, shown in ((5, "'aaaaa'"), (6, "'aaaaaa'"), (7, "'aaaaaaa...")):
        assert quote("a" * length, 8) == shown
    assert quote([1] * 500, 8) == "[1, 1, 1..." and quote({"a": 1}) == "{'a': 1}"
    assert quote(10**5000) == "a int too long to show"


def test_the_first_three_of_many_are_quoted():
    assert quote_some(["a"]) == "'a'"
    assert quote_some(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert quote_some(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 more"


def sentences(text, tmp_path):
    """Yield what each reader of a file or a name says of a text that it does not take."""
    spec, plan = {"kind": "clear", "radius": 2}, {"format": "linearize/plan/1", "host": "flux"}
    model = {"file": "m.safetensors"}
    job = {"format": "linearize/training/1", "stage": "transfer", "model": model, "samples": "s", "output": "o"}
    calls = [
        lambda: spec_from_json(text), lambda: spec_from_json({"kind": text}), lambda: spec_from_json({**spec, text: 1}),
        lambda: spec_from_json({**spec, "radius": text}), lambda: spec_from_json({**spec, "proportional": text}),
        lambda: spec_from_json({"kind": "linear", "feature_map": text}),
        lambda: spec_from_json([{"heads": [text], "spec": spec}]), lambda: spec_from_json([text]),
        lambda: Plan.from_json({**plan, "sites": {text: 3}}), lambda: Plan.from_json({**plan, text: 1}),
        lambda: Plan.from_json({**plan, "format": text}), lambda: select_sites(text + "?", ["double.0"]),
        lambda: job_from_json({**job, text: 1}, tmp_path), lambda: job_from_json({**job, "format": text}, tmp_path),
        lambda: job_from_json({**job, "stage": text}, tmp_path),
        lambda: job_from_json({**job, "plans": text}, tmp_path),
        lambda: job_from_json({**job, "plans": [plan], "device": text}, tmp_path),
        lambda: job_from_json({**job, "plans": [plan], "model": {**model, "kind": text}}, tmp_path),
        lambda: check_student(student(host=text), "flux", ()), lambda: StudentFile("flux", Plan(text)),
        lambda: StudentFile("flux", Plan("flux"), role=text),
        lambda: StudentFile("flux", Plan("flux"), site_errors={text: -1.0}),
        lambda: StudentFile("flux", Plan("flux"), parameters={text: torch.ones(1)}),
        lambda: (_ for _ in ()).throw(problem(tmp_path / text, "is empty")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        yield str(error.value)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_refusals_quote_files_on_one_line(text, tmp_path):
    for sentence in sentences(text, tmp_path):
        is_shown_well(sentence)


@pytest.mark.parametrize("text", [each for each in HOSTILE if "\ud83d" not in each and len(each) < 500])
def test_metadata_and_tensor_names_are_quoted(text, tmp_path):
    path = tmp_path / "file.safetensors"
    for tensors, metadata in (({text or "x": torch.ones(2)}, {"format": "linearize/1"}), ({}, {"format": text})):
        write_tensor_file(path, tensors, metadata)
        with pytest.raises(ValueError) as error:
            load_student(path)
        is_shown_well(str(error.value))
    with pytest.raises(ValueError) as error:
        open_tensor_file(path).load([text])
    is_shown_well(str(error.value))


def student(host="flux", **values):
    plan = Plan(host, rules=((values.pop("sites", "all"), ClearSpec(3)),))
    return StudentFile(host, plan, **values)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_student_on_a_node_is_a_line_per_fact(text, tmp_path):
    hostile = student(
        host=text, base_model=text, licence=text, pair_id=text, sites=text, site_errors={text: 0.5}, recipe={text: text}
    )
    lines = describe_student(hostile)
    assert len(lines) == 2
    for line in lines:
        is_shown_well(line)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_card_says_what_the_file_says_and_does_nothing(text):
    plain = {"base_model": "a", "licence": "b", "pair_id": "c", "site_errors": {"double.0": 0.5}, "recipe": {"n": "d"}}
    hostile = {**dict.fromkeys(("base_model", "licence", "pair_id"), text), "site_errors": {text: 0.5}}
    hostile["recipe"] = {text: text}
    file = HubFile("me/student", "student.safetensors")
    expected, found = (model_card(student(**values), file, 9) for values in (plain, hostile))
    assert len(found) < 12_000 and all(line.isprintable() for line in found.split("\n"))
    _, head, body = found.split("---\n", 2)
    data = yaml.safe_load(head)
    assert set(data) <= {"license", "license_name", "base_model", "base_model_relation", "tags"}
    assert data["license"] == "other" and re.fullmatch(r"[a-z0-9.-]{1,60}", data["license_name"])
    outside, fence = body.split("```json")
    assert fence.count("```") == 1 and len(re.findall(r"(?m)^#", fence)) == 0
    like = expected.split("---\n", 2)[2].split("```json")[0]
    for mark in (r"\n", r"(?m)^#", r"(?m)^---", r"(?<!\\)\|", r"(?<!\\)`"):
        assert len(re.findall(mark, outside)) == len(re.findall(mark, like)), mark
    given = outside.replace("(https://github.com/linearize/linearize)", "")
    for active in (r"(?<!\\)<", r"(?<!\\)!\[", r"(?<!\\)\]\(", r"(?<!\\)://", r"www\.", r"(?<!\\)@", r"(?<!\\)&"):
        assert not re.search(active, given), active


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_samples_of_a_stranger_are_named_on_one_line(text, tmp_path):
    about = {"fingerprint": torch.ones(256), "latent_shape": (1, 16, 4, 4), "steps": 1, "cfg": 1.0, "guidance": 0.0,
             "seeds": 1, "first_seed": 0, **dict.fromkeys(("host", "sampler", "scheduler", "base_model"),
             text)}  # fmt: skip
    found = About(**about)
    for difference in found.differences(About(**{**about, "host": "flux", "sampler": "euler", "scheduler": "simple"})):
        is_shown_well(difference)
    stand_in = type("Samples", (), {"about": found, "folder": tmp_path})()
    with pytest.raises(ValueError) as error:
        check_samples(stand_in, "flux", torch.ones(256))
    is_shown_well(str(error.value))
    (tmp_path / "about.json").write_text(json.dumps({**found.to_json(), "format": text}), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_about(tmp_path)
    is_shown_well(str(error.value))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_log_gets_one_line_a_sentence(text, caplog):
    with caplog.at_level(logging.INFO, "linearize"):
        Once().warning(f"Linearize: {text}")
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert caplog.records


def test_a_student_that_is_saved_and_loaded_keeps_its_texts_as_they_are(tmp_path):
    path = tmp_path / "s.safetensors"
    save_student(path, student(base_model="two\nlines", licence="\u202ex"))
    assert (load_student(path).base_model, load_student(path).licence) == ("two\nlines", "\u202ex")
