"""A samples folder: what is written is read, what is wrong is one sentence, and what it says of itself is stable."""

import json
import re
import shutil

import pytest
import torch
from sample_maker import FINGERPRINT, PROMPTS, about, condition, make, noise

from linearize.attention.students.tensor_values import content_sha256
from linearize.training.samples.conditioning import Conditioning
from linearize.training.samples.files import SamplesProblem
from linearize.training.samples.folder import TeacherSamples, check_samples
from linearize.training.samples.index import OTHER, read_about
from linearize.training.samples.writer import SamplesWriter


@pytest.fixture
def folder(tmp_path):
    """Six finished samples: three prompts, two seeds."""
    make(tmp_path / "lake")
    return tmp_path / "lake"


def same(first, second):
    tensors, others = first.stored(), second.stored()
    return (
        tensors.keys() == others.keys()
        and all(torch.equal(tensors[name], others[name]) for name in tensors)
        and all(tensors[name].dtype == others[name].dtype for name in tensors)
        and first.values == second.values
    )


def test_what_is_written_is_read(folder):
    samples = TeacherSamples.open(folder)
    assert len(samples) == 6 and [each.number for each in samples.entries] == list(range(6))
    assert [each.prompt for each in samples.entries] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [each.seed for each in samples.entries] == [7, 8, 9, 10, 11, 12]
    for number in range(6):
        assert torch.equal(samples.latent(number), noise(7 + number, 1, 4, 6, 8))
        assert same(samples.conditioning(number), condition(PROMPTS[number // 2]))
        assert same(samples.conditioning(number, negative=True), condition(""))
    assert samples.has_negative
    assert not samples.about.differences(about()) and torch.equal(samples.about.fingerprint, FINGERPRINT)


def test_tensors_are_normal_ones_inside_inference_mode_too(folder):
    with torch.inference_mode():
        samples = TeacherSamples.open(folder)
        read = [samples.latent(0), *samples.conditioning(0).stored().values()]
    assert not [tensor for tensor in read if tensor.is_inference()]


def test_a_latent_in_16_bits_is_stored_as_it_came_and_read_in_32(tmp_path):
    with SamplesWriter(tmp_path / "half", about(cfg=1.0, seeds=1)) as writer:
        writer.add(0, "a", noise(1, 1, 4, 6, 8).half(), writer.put(Conditioning(None)), None)
    latent = TeacherSamples.open(tmp_path / "half").latent(0)
    assert latent.dtype == torch.float32 and torch.equal(latent, noise(1, 1, 4, 6, 8).half().float())


def test_the_files_are_as_documented(folder):
    assert {path.name for path in folder.iterdir()} == {"about.json", "index.jsonl", "latents", "conditioning", "lock"}
    assert json.loads((folder / "about.json").read_text())["format"] == "linearize/samples/1"
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(lines[3]) == ["number", "prompt", "seed", "shape", "latent", "sha256", "positive", "negative"]
    assert lines[3]["latent"] == "latents/000003.safetensors" and lines[3]["shape"] == [1, 4, 6, 8]
    assert len(list((folder / "latents").iterdir())) == 6
    conditionings = {path.relative_to(folder).as_posix() for path in (folder / "conditioning").iterdir()}
    assert conditionings == {condition(text).file for text in (*PROMPTS, "")}, "equal prompts share a file"


def test_at_cfg_1_no_negative_counts(tmp_path):
    make(tmp_path / "one", about(cfg=1.0))
    samples = TeacherSamples.open(tmp_path / "one")
    assert not samples.has_negative and {each.negative for each in samples.entries} == {None}
    with pytest.raises(SamplesProblem, match="sample 2 in .* has no negative conditioning, its cfg is 1"):
        samples.conditioning(2, negative=True)


def test_the_digest_tells_contents_and_not_places(folder, tmp_path):
    digest = TeacherSamples.open(folder).digest
    assert digest == TeacherSamples.open(shutil.copytree(folder, tmp_path / "copy")).digest
    make(tmp_path / "again")
    assert TeacherSamples.open(tmp_path / "again").digest == digest
    for name, changes in {"steps": {"steps": 5}, "seed": {"first_seed": 8}}.items():
        make(tmp_path / name, about(**changes))
        assert TeacherSamples.open(tmp_path / name).digest != digest
    make(folder, prompts=[*PROMPTS, "more"])
    assert TeacherSamples.open(folder).digest != digest


def test_contents_are_known_by_every_part():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)}
    shuffled = {"b": base["b"], "a": base["a"].t().contiguous().t()}
    assert content_sha256(base) == content_sha256(shuffled)
    others = [
        {"a": base["a"]},
        {**base, "b": torch.tensor(2.0)},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
    ]
    found = {content_sha256(each) for each in [base, *others]} | {content_sha256(base, {"guidance": 3.5})}
    assert len(found) == 7


@pytest.mark.parametrize(
    ("host", "shift", "expected"),
    [
        ("flux", 0.0, "same"),
        ("flux", 0.1, "fine-tune"),
        ("flux", 0.9, r"are of another model, tiny\.safetensors \(norms 86% apart\); make this model's own with"),
        ("wan", 0.0, r"are of host flux \(tiny\.safetensors\), this model is wan; make its own with Generate"),
    ],
)
def test_samples_of_another_model_are_refused(folder, host, shift, expected):
    samples, found = TeacherSamples.open(folder), FINGERPRINT + shift
    if expected in ("same", "fine-tune"):
        assert check_samples(samples, host, found) == expected
    else:
        with pytest.raises(SamplesProblem, match=expected):
            check_samples(samples, host, found)


def edit_line(folder, place, /, **changes):
    lines = (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()
    lines[place] = json.dumps({**json.loads(lines[place]), **changes})
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_about(folder, **changes):
    data = {**json.loads((folder / "about.json").read_text()), **changes}
    (folder / "about.json").write_text(json.dumps({name: value for name, value in data.items() if value != "gone"}))


DAMAGE = {
    "no folder": (shutil.rmtree, "there are no teacher samples in .*; make them with Generate Teacher Samples"),
    "no about": (lambda folder: (folder / "about.json").unlink(), "there are no teacher samples in"),
    "no index": (lambda folder: (folder / "index.jsonl").unlink(), "no sample in .* is finished; run Generate"),
    "no latent": (lambda folder: (folder / "latents/000004.safetensors").unlink(), "sample 4 in .* lost its files"),
    "no conditioning": (lambda folder: shutil.rmtree(folder / "conditioning"), "sample 0 in .* lost its files"),
    "line lost": (
        lambda folder: (folder / "index.jsonl").write_bytes(
            b"".join((folder / "index.jsonl").read_bytes().splitlines(True)[2:])
        ),
        "sample 0 in .* lost its files",
    ),
    "line damaged": (
        lambda folder: (folder / "index.jsonl").write_bytes(b"{}\n" + (folder / "index.jsonl").read_bytes()),
        "line 1 of .*index.jsonl is damaged; delete it, and run",
    ),
    "line twice": (
        lambda folder: edit_line(folder, 1, number=0, latent="latents/000000.safetensors", seed=7),
        "line 2 of .* is damaged",
    ),
    "latent elsewhere": (lambda folder: edit_line(folder, 0, latent="../../secret.safetensors"), "line 1 of"),
    "positive elsewhere": (lambda folder: edit_line(folder, 0, positive="conditioning/../x.safetensors"), "line 1 of"),
    "negative elsewhere": (lambda folder: edit_line(folder, 0, negative="/etc/passwd"), "line 1 of"),
    "seed": (lambda folder: edit_line(folder, 2, seed=1), "line 3 of"),
    "seed as fraction": (lambda folder: edit_line(folder, 0, seed=7.0), "line 1 of"),
    "number below 0": (
        lambda folder: edit_line(folder, 0, number=-1, latent="latents/-00001.safetensors", seed=6),
        "line 1 of",
    ),
    "number": (lambda folder: edit_line(folder, 2, number=True), "line 3 of"),
    "shape": (lambda folder: edit_line(folder, 2, shape=[1, 4, 8, 6]), "line 3 of"),
    "extra": (lambda folder: edit_line(folder, 2, extra=1), "line 3 of"),
    "format": (
        lambda folder: edit_about(folder, format="linearize/samples/9"),
        "has format 'linearize/samples/9', this version reads linearize/samples/1",
    ),
    "about no JSON": (lambda folder: (folder / "about.json").write_text("{"), "has format None, this version reads"),
    "about nested": (lambda folder: (folder / "about.json").write_text("[" * 100_000), "has format None"),
    "about text": (lambda folder: edit_about(folder, steps="4"), "is damaged .*steps is '4'.*; choose a new name"),
    "about infinite": (lambda folder: edit_about(folder, cfg=float("inf")), "is damaged .*cfg is inf"),
    "about lacks": (lambda folder: edit_about(folder, seeds="gone"), "is damaged .*seeds"),
    "about shape": (lambda folder: edit_about(folder, latent_shape=[1, -4, 6, 8]), "latent_shape is no shape"),
    "about empty": (lambda folder: edit_about(folder, latent_shape=[1, 0, 6, 8]), "latent_shape is no shape"),
    "about flat": (lambda folder: edit_about(folder, latent_shape=[4, 8]), "latent_shape is no shape"),
    "fingerprint huge": (
        lambda folder: edit_about(folder, fingerprint=[1e300] * 256),
        "fingerprint has not 256 values",
    ),
    "fingerprint": (lambda folder: edit_about(folder, fingerprint=[1.0]), "fingerprint has not 256 values"),
    "fingerprint texts": (lambda folder: edit_about(folder, fingerprint=["a"] * 256), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_one_sentence(folder, name):
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(SamplesProblem, match=words) as problem:
        TeacherSamples.open(folder)
    assert "\n" not in str(problem.value)


def test_models_are_told_apart_by_their_digests_and_without_them_by_their_norms():
    digests, other_norms = ("a" * 64, "b" * 64), FINGERPRINT * 2
    assert about(model=digests[0]).differences(about(model=digests[0], fingerprint=other_norms)) == []
    assert about(model=digests[0]).differences(about(model=digests[1])) == [OTHER]
    for one, two in (("", ""), (digests[0], ""), ("", digests[0])):
        (found,) = about(model=one).differences(about(model=two, fingerprint=other_norms))
        assert found.startswith("model is another one (norms ")
        assert about(model=one).differences(about(model=two)) == []


def test_a_folder_numbers_its_samples_with_six_digits(folder):
    edit_about(folder, seeds=10**6)
    assert read_about(folder).seeds == 10**6
    edit_about(folder, seeds=10**6 + 1)
    with pytest.raises(SamplesProblem, match="seeds is a whole number of at most 1000000, got 1000001"):
        read_about(folder)


def test_a_file_that_was_replaced_is_refused_and_made_anew_when_deleted(folder):
    first, second = folder / "latents/000000.safetensors", folder / "latents/000001.safetensors"
    shutil.copy(second, first)
    samples = TeacherSamples.open(folder)
    words = r"latents/000000\.safetensors in .* is not the file that was written there; delete it, and run Generate"
    with pytest.raises(SamplesProblem, match=words):
        samples.latent(0)
    positive = [path for path in (folder / "conditioning").iterdir() if path.stem in samples.entries[0].positive][0]
    negative = [path for path in (folder / "conditioning").iterdir() if path.stem in samples.entries[0].negative][0]
    shutil.copy(negative, positive)
    with pytest.raises(SamplesProblem, match=re.escape(f"conditioning/{positive.name}")):
        samples.conditioning(0)
    first.unlink()
    positive.unlink()
    assert make(folder) == [0, 1]
    samples = TeacherSamples.open(folder)
    assert torch.equal(samples.latent(0), noise(7, 1, 4, 6, 8)) and same(samples.conditioning(0), condition(PROMPTS[0]))


def test_foreign_tensor_files_are_refused(folder):
    from safetensors.torch import save_file

    samples = TeacherSamples.open(folder)
    for metadata in ({}, {"format": "linearize/samples/1", "values": "[]"},
                     {"format": "linearize/samples/1", "values": '{"a": [1]}'}):  # fmt: skip
        save_file({"cross_attn": torch.ones(1, 2, 3)}, folder / samples.entries[0].positive, metadata)
        with pytest.raises(SamplesProblem, match="is no file of teacher samples; delete it, and run"):
            samples.conditioning(0)
