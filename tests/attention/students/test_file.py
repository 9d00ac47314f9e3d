"""Student files: a round trip, one sentence for each wrong file, and which models a student fits."""

import json
import math

import pytest
import torch

from linearize.attention.hosts.base import Site
from linearize.attention.kinds.feature_maps import Favor
from linearize.attention.plans import Plan
from linearize.attention.specs import (
    ClearSpec,
    DenseSpec,
    FoveatedSpec,
    HeadGroup,
    HeadSplit,
    HybridSpec,
    LinearSpec,
    radius_per_head,
)
from linearize.attention.students import file as student_file
from linearize.attention.students.file import StudentFile, load_student, save_student, student_of
from linearize.attention.students.fingerprint import fingerprint
from linearize.attention.students.fit import check_student, student_maps, student_parameters
from linearize.attention.students.tensor_file import FileProblem, open_tensor_file, write_tensor_file

SITES = tuple(Site(f"{group}.{i}", 4, 8) for group, count in (("double", 2), ("single", 4)) for i in range(count))
KEY = "diffusion_model.double_blocks.0.img_attn.qkv"


def plan(**rules):
    specs = {"double": ClearSpec(8, down_factor=4), "single.2-3": LinearSpec("hedgehog", 16), **rules}
    return Plan("flux", ClearSpec(8), tuple(specs.items()))


def student(**changes):
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape):
        return torch.rand(shape, generator=generator, device="cpu")

    values = {
        "host": "flux",
        "plan": plan(),
        "role": "high",
        "pair_id": "a1b2",
        "base_model": "FLUX.1-dev",
        "recipe": {"steps": 2000, "loss": {"block": 1.0}, "name": "é"},
        "site_errors": {"double.0": 0.05, "single.2": 0.0},
        "licence": "apache-2.0",
        "fingerprint": fingerprint([random(128)]),
        "parameters": {
            "double.0.pool": random(4, 4),
            "single.2.phi_q.weight": random(4, 8, 8),
            "single.2.phi_k.weight": random(4, 8, 8).bfloat16(),
            "single.3.phi_q.weight": random(4, 8, 8),
            "single.3.phi_k.weight": random(4, 8, 8).half(),
        },
        "deltas": {
            f"{KEY}.lora_up.weight": random(24, 2),
            f"{KEY}.lora_down.weight": random(2, 8).half(),
            f"{KEY}.alpha": torch.tensor(2.0),
            "diffusion_model.single_blocks.0.linear1.lora_A.weight": random(3, 8),
            "diffusion_model.single_blocks.0.linear1.lora_B.weight": random(24, 3),
            "diffusion_model.single_blocks.1.linear1.diff": random(24, 8),
            "diffusion_model.single_blocks.1.linear1.diff_b": random(24),
            "diffusion_model.single_blocks.2.linear1.set_weight": random(24, 8),
        },
    }
    return StudentFile(**{**values, **changes})


def same(one, two):
    """Return whether two students hold the same, bit for bit."""
    plain = ("host", "role", "pair_id", "base_model", "licence", "plan", "recipe", "site_errors")
    tensors = [
        {**found.parameters, **found.deltas, **({} if found.fingerprint is None else {"": found.fingerprint})}
        for found in (one, two)
    ]
    return (
        all(getattr(one, name) == getattr(two, name) for name in plain)
        and tensors[0].keys() == tensors[1].keys()
        and one.parameters.keys() == two.parameters.keys()
        and all(
            t.dtype == tensors[1][name].dtype and torch.equal(t, tensors[1][name]) for name, t in tensors[0].items()
        )
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "student.safetensors"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"role": "all", "pair_id": "", "base_model": "", "licence": "", "recipe": {}, "site_errors": {}},
        {"fingerprint": None, "parameters": {}, "deltas": {}},
        {"plan": Plan("flux", DenseSpec(), (("double.1", radius_per_head((4, 8, 8, 4))),)), "parameters": {}},
        {
            "plan": Plan("flux", FoveatedSpec(levels=3)),
            "parameters": {"double.1.bias": torch.rand(4, 3), "double.1.pool_logits": torch.rand(4, 2, 2).half()},
        },
    ],
)
def test_round_trip(path, changes):
    save_student(path, student(**changes))
    assert same(load_student(path), student(**changes))


def test_what_the_file_says(path):
    save_student(path, student())
    file = open_tensor_file(path)
    assert file.metadata["format"] == "linearize/1" and file.metadata["role"] == "high"
    assert json.loads(file.metadata["plan"]) == plan().to_json()
    assert json.loads(file.metadata["recipe"])["steps"] == 2000
    assert json.loads(file.metadata["site_errors"]) == {"double.0": 0.05, "single.2": 0.0}
    assert set(file.tensors) == {"fingerprint", *student().parameters, *student().deltas}


def drawn(**changes):
    return student(plan=plan(single=HybridSpec(2, "favor")), parameters={}, **changes)


def test_a_file_says_which_draw_its_students_were_made_with(path):
    """One from before there were two has the first, as trained; one without `favor` says nothing."""
    for draw in (1, 2):
        save_student(path, drawn(draw=draw))
        found = load_student(path)
        assert found.draw == draw and open_tensor_file(path).metadata["favor_draw"] == str(draw)
        maps = student_maps(found, found.plan.resolve([site.id for site in SITES]), SITES)["single.0"]
        expected = Favor(4, 8)
        expected.take_draw(draw)
        assert all(torch.equal(each.directions, expected.directions) for each in maps)
    save_student(path, student())
    assert "favor_draw" not in open_tensor_file(path).metadata


def test_a_file_from_before_there_were_two_draws(path):
    save_student(path, drawn(draw=1))
    file = open_tensor_file(path)
    held, texts = file.load(file.tensors), {k: v for k, v in file.metadata.items() if k != "favor_draw"}
    write_tensor_file(path, held, {**texts, "sha256": student_file._checksum(texts, held)})
    assert load_student(path).draw == 1
    for draw in ("3", "0", "", "x", "9" * 5000):
        told = {**texts, "favor_draw": draw}
        write_tensor_file(path, held, {**told, "sha256": student_file._checksum(told, held)})
        with pytest.raises(FileProblem, match="favor has draws 1 to 2"):
            load_student(path)
    write_tensor_file(path, held, {**file.metadata, "favor_draw": "2"})
    with pytest.raises(FileProblem, match="changed after it was saved"):
        load_student(path)


def rewrite(path, tensors=None, **metadata):
    """Save a student, then write it again with other tensors or metadata; None leaves a text out."""
    save_student(path, student())
    file = open_tensor_file(path)
    texts = {**file.metadata, **metadata}
    held = file.load(file.tensors)
    write_tensor_file(path, {**held, **(tensors or {})}, {k: v for k, v in texts.items() if v is not None})


def test_what_others_add_to_the_metadata_and_the_order_of_tensors_do_not_matter(path):
    save_student(path, student())
    file = open_tensor_file(path)
    tensors = dict(reversed(file.load(file.tensors).items()))
    write_tensor_file(path, tensors, {"modelspec.title": "mine", **file.metadata})
    assert same(load_student(path), student())


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": None}, "is not a Linearize student, which has format linearize/1: its metadata names no format"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"format": "linearize/plan/1"}, "its format is 'linearize/plan/1'"),
        ({"format": "linearize/2"}, "format linearize/2 and this Linearize reads linearize/1; install a newer one"),
        ({"plan": None, "licence": None}, "its metadata lacks licence, plan"),
        ({"sha256": None}, "its metadata lacks sha256"),
        ({"licence": "mine"}, "changed after it was saved"),
        ({"role": "low"}, "changed after it was saved"),
        ({"sha256": "0" * 64}, "changed after it was saved"),
    ],
)
def test_wrong_metadata_is_one_clear_sentence(path, metadata, words):
    rewrite(path, **metadata)
    with pytest.raises(FileProblem) as error:
        load_student(path)
    assert words in str(error.value) and str(error.value).startswith("student.safetensors ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"role": "middle"}, "role of a student is one of high, low, all, got 'middle'"),
        ({"host": "wan"}, "for host 'wan', its plan for 'flux'"),
        ({"plan": "{"}, "the plan is not JSON: Expecting property name"),
        ({"plan": '{"format": "linearize/plan/1", "host": "flux", "default": {"kind": "x"}}'}, "kind is one of"),
        ({"plan": '{"a":' * 100_000}, "cannot be used: "),
        ({"plan": "[" + "1" * 5000 + "]"}, "cannot be used: "),
        ({"recipe": "[]"}, "its recipe is not a JSON object, got []"),
        ({"recipe": "{"}, "its recipe is not JSON: Expecting property name"),
        ({"recipe": '{"a":' * 100_000}, "cannot be used: "),
        ({"site_errors": '{"double.0": "low"}'}, "site_errors are numbers of 0 or more by site, got 'double.0': 'low'"),
        ({"site_errors": '{"double.0": NaN}'}, "got 'double.0': nan"),
        ({"site_errors": "3"}, "its site_errors is not a JSON object"),
    ],
)
def test_values_out_of_range_under_a_right_checksum(path, metadata, words):
    save_student(path, student())
    file = open_tensor_file(path)
    texts, tensors = {**file.metadata, **metadata}, file.load(file.tensors)
    write_tensor_file(path, tensors, {**texts, "sha256": student_file._checksum(texts, tensors)})
    with pytest.raises(FileProblem) as error:
        load_student(path)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_changed_tensors(path):
    rewrite(path, {"double.0.pool": torch.zeros(4, 4)})
    with pytest.raises(FileProblem, match="changed after it was saved"):
        load_student(path)
    rewrite(path, {"model.weight": torch.zeros(1), "x": torch.zeros(1)})
    with pytest.raises(FileProblem, match="holds 'model.weight', 'x', which no student of format linearize/1 has"):
        load_student(path)
    rewrite(path, {str(i): torch.zeros(1) for i in range(5)})
    with pytest.raises(FileProblem, match=r"holds '0', '1', '2' and 2 more, which"):
        load_student(path)


def test_swapped_tensors(path):
    swapped = {"double.0.pool": torch.rand(4, 4), "double.1.pool": torch.rand(4, 4)}
    save_student(path, student(parameters=swapped))
    file = open_tensor_file(path)
    tensors = file.load(file.tensors)
    tensors |= {"double.0.pool": tensors["double.1.pool"], "double.1.pool": tensors["double.0.pool"]}
    write_tensor_file(path, tensors, file.metadata)
    with pytest.raises(FileProblem, match="changed after it was saved, its checksum does not agree"):
        load_student(path)


def test_wrong_containers_keep_their_own_sentence(path):
    for content, words in ((b"\x80\x02}q\x00.", "pickle"), (b"{}", "2 bytes")):
        path.write_bytes(content)
        with pytest.raises(FileProblem, match=words):
            load_student(path)
    path.write_bytes((5 * 2**20).to_bytes(8, "little") + b"{}")
    with pytest.raises(FileProblem, match="5242880 bytes, at most 1048576 are read"):
        load_student(path)


def test_a_student_with_a_wrong_fingerprint(path):
    write = {"fingerprint": torch.zeros(255)}
    save_student(path, student())
    file = open_tensor_file(path)
    tensors = {**file.load(file.tensors), **write}
    write_tensor_file(path, tensors, {**file.metadata, "sha256": student_file._checksum(file.metadata, tensors)})
    with pytest.raises(FileProblem, match=r"256 values in fp32, got \(255,\) in torch.float32"):
        student_of(open_tensor_file(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"role": "both"}, "role of a student is one of high, low, all, got 'both'"),
        ({"pair_id": 3}, "pair_id of a student is a text, got 3"),
        ({"licence": None}, "licence of a student is a text, got None"),
        ({"host": "wan"}, "the student is for host 'wan', its plan for 'flux'"),
        ({"site_errors": {"double.0": -0.1}}, "numbers of 0 or more by site"),
        ({"site_errors": {"double.0": math.inf}}, "numbers of 0 or more by site"),
        ({"fingerprint": torch.zeros(256).half()}, r"got (256,) in torch.float16"),
        (
            {"parameters": {"double.0.radius": torch.zeros(1)}},
            "a learned parameter is called <site>.pool, .bias, .pool_logits, .output.weight, .phi_q.* or .phi_k.*, got",
        ),
        ({"parameters": {"pool": torch.zeros(1, 1)}}, "got 'pool'"),
        ({"parameters": {"double.0.phi_q": torch.zeros(1)}}, "got 'double.0.phi_q'"),
        ({"parameters": {"fingerprint": torch.zeros(1)}}, "got 'fingerprint'"),
        ({"parameters": {"double.0.pool": torch.zeros(4)}}, "as many rows as columns, 'double.0.pool' has (4,)"),
        ({"parameters": {"double.0.pool": torch.zeros(4, 3)}}, "'double.0.pool' has (4, 3)"),
        ({"parameters": {"double.0.bias": torch.zeros(4)}}, "for each head and level, 'double.0.bias' has (4,)"),
        (
            {"parameters": {"double.0.pool_logits": torch.zeros(4, 4)}},
            "each head, 'double.0.pool_logits' has (4, 4)",
        ),
        ({"parameters": {"double.0.pool_logits": torch.zeros(4, 2, 3)}}, "'double.0.pool_logits' has (4, 2, 3)"),
        ({"parameters": {"double.0.pool": torch.ones(2, 2).long()}}, "'double.0.pool' holds torch.int64"),
        ({"deltas": {"double_blocks.0.diff": torch.zeros(1)}}, "with a LoRA ending (lora_up.weight, lora_down.weight"),
        ({"deltas": {f"{KEY}.lora_mid.weight": torch.zeros(1)}}, f"got '{KEY}.lora_mid.weight'"),
        ({"deltas": {f"{KEY}.diff": torch.ones(1).int()}}, f"'{KEY}.diff' holds torch.int32"),
        ({"deltas": {f"{KEY}.lora_up.weight": torch.ones(8, 2)}}, f"comes without '{KEY}.lora_down.weight'"),
        ({"deltas": {f"{KEY}.lora_A.weight": torch.ones(8, 2)}}, f"comes without '{KEY}.lora_B.weight'"),
        ({"deltas": {f"{KEY}.alpha": torch.ones(1)}}, "an alpha is one number beside the halves of a LoRA"),
        (
            {"deltas": {f"{KEY}.lora_B.weight": torch.ones(8, 2), f"{KEY}.lora_A.weight": torch.ones(3, 8)}},
            "of one rank",
        ),
        (
            {"deltas": {f"{KEY}.lora_up.weight": torch.ones(8), f"{KEY}.lora_down.weight": torch.ones(8)}},
            "of one rank",
        ),
    ],
)
def test_no_student_is_made_of_wrong_values(changes, words):
    with pytest.raises(ValueError) as error:
        student(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", [{"a": torch.zeros(1)}, {"a": math.nan}, {"a": {1, 2}}])
def test_a_recipe_is_json(path, recipe):
    with pytest.raises(ValueError, match="the recipe of a student holds what JSON can hold: "):
        save_student(path, student(recipe=recipe))
    assert not path.exists()


def test_no_file_is_written_that_would_not_be_read(path):
    with pytest.raises(ValueError, match="take at most 524288 bytes; shorten its recipe"):
        save_student(path, student(recipe={"log": "a" * 2**19}))
    many = {f"single.2.phi_q.layers.{i}.weight": torch.ones(1) for i in range(4000)}
    save_student(path, student(parameters=many, recipe={"log": "a" * 2**18}))
    assert len(load_student(path).parameters) == 4000


def test_a_save_that_fails_leaves_the_old_student(path, monkeypatch):
    save_student(path, student())
    bad = student(parameters={"double.0.pool": torch.full((4, 4), math.nan)})
    with pytest.raises(FileProblem, match="was not written: 'double.0.pool' holds NaN"):
        save_student(path, bad)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FileProblem, match="cannot be written: No space left on device"):
        save_student(path, student(role="low"))
    assert same(load_student(path), student()) and [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_student_that_fits():
    specs = check_student(student(), "flux", SITES)
    assert list(specs) == [site.id for site in SITES]
    assert specs["double.1"] == ClearSpec(8, down_factor=4)  # no pooling weight: the uniform mean
    assert specs["single.0"] == ClearSpec(8) and specs["single.3"] == LinearSpec("hedgehog", 16)


def test_the_sites_of_a_model_get_what_the_file_holds():
    matrices = torch.rand(4, 8, 8)
    given = student(parameters={**student().parameters, "single.0.output.weight": matrices})
    parameters = student_parameters(given, check_student(given, "flux", SITES), SITES)
    cpu = torch.device("cpu")
    assert set(parameters.by_site()) == {"double.0", "single.2", "single.3", "single.0"}
    for site, part in (("single.2", 0), ("single.3", 1)):
        name = f"{site}.{('phi_q', 'phi_k')[part]}.weight"
        assert torch.equal(parameters.learned(site, cpu).maps[part].weight, given.parameters[name])
    assert torch.equal(parameters.learned("double.0", cpu).pool, given.parameters["double.0.pool"])
    assert torch.equal(parameters.learned("single.0", cpu).output, matrices)
    assert parameters.learned("double.1", cpu).pool is None


def test_what_a_foveated_site_learned_runs_at_it():
    given = {"double.0.bias": torch.rand(4, 3), "double.0.pool_logits": torch.rand(4, 2, 2)}
    given["single.1.bias"] = torch.rand(4, 3)
    file = student(plan=Plan("flux", FoveatedSpec(levels=3)), parameters=given, deltas={})
    parameters = student_parameters(file, check_student(file, "flux", SITES), SITES)
    assert set(parameters.by_site()) == {"double.0", "single.1"}
    learned = parameters.learned("double.0", torch.device("cpu"))
    assert torch.equal(learned.bias, given["double.0.bias"])
    assert torch.equal(learned.pool_logits, given["double.0.pool_logits"])
    assert parameters.learned("single.1", torch.device("cpu")).pool_logits is None
    stored = {
        f"{site}.{name}": tensor
        for site, module in parameters.parameters_by_site().items()
        for name, tensor in module.stored().items()
    }
    assert stored.keys() == given.keys() and all(torch.equal(stored[name], given[name]) for name in given)
    joined = parameters.without({"double.0"}).joined(parameters)
    assert set(joined.by_site()) == {"double.0", "single.1"}


def test_a_split_site_has_one_pooling_weight():
    split = radius_per_head((4, 8, 8, 4), ClearSpec(down_factor=4))
    found = check_student(student(plan=plan(double=split)), "flux", SITES)
    assert found["double.0"] == split
    mixed = HeadSplit((HeadGroup((0, 1), ClearSpec(8, down_factor=4)), HeadGroup((2, 3), ClearSpec(8, down_factor=2))))
    with pytest.raises(ValueError, match=r"has shape \(4, 4\), the plan takes \(2, 2\) and \(4, 4\)"):
        check_student(student(plan=plan(double=mixed)), "flux", SITES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": plan(**{"triple.0": DenseSpec()})}, "names no site of this model, which has double.0-1, single.0-3"),
        ({"plan": plan(**{"single.9": DenseSpec()})}, "'single.9' names no site of this model"),
        (
            {"plan": plan(double=radius_per_head((4, 8)))},
            "does not fit double.0: the plan names 2 heads for a site that has 4",
        ),
        (
            {"parameters": {"double.7.pool": torch.ones(4, 4)}},
            "has 'double.7.pool', this model has only double.0-1, single.0-3",
        ),
        ({"parameters": {"double.0.pool": torch.ones(2, 2)}}, "has shape (2, 2), the plan takes (4, 4)"),
        ({"parameters": {"single.0.pool": torch.ones(4, 4)}}, "'single.0.pool', its plan takes no pool at that site"),
        ({"parameters": {"single.2.pool": torch.ones(4, 4)}}, "'single.2.pool', its plan takes no pool"),
        ({"parameters": {"single.0.bias": torch.ones(4, 1)}}, "'single.0.bias', its plan takes no bias at that site"),
        (
            {"plan": Plan("flux", FoveatedSpec(levels=2)), "parameters": {"double.0.bias": torch.ones(4, 3)}},
            "'double.0.bias' has shape (4, 3), the plan takes (4, 2)",
        ),
        (
            {"plan": Plan("flux", FoveatedSpec()), "parameters": {"double.0.pool_logits": torch.ones(2, 4, 4)}},
            "'double.0.pool_logits' has shape (2, 4, 4), the plan takes (4, 4, 4)",
        ),
        (
            {"plan": Plan("flux", FoveatedSpec(tile=1)), "parameters": {"double.0.pool_logits": torch.ones(4, 1, 1)}},
            "its plan takes no pool_logits at that site",
        ),
        ({"parameters": {"double.0.phi_q.weight": torch.ones(4)}}, "its plan has no feature map at that site"),
        (
            {"parameters": {"single.0.output.weight": torch.ones(4, 8, 7)}},
            "has shape (4, 8, 7), the site takes (4, 8, 8) if it is not dense",
        ),
        (
            {"plan": plan(**{"single.0": DenseSpec()}), "parameters": {"single.0.output.weight": torch.ones(4, 8, 8)}},
            "'single.0.output.weight' has shape (4, 8, 8), the site takes (4, 8, 8) if it is not dense",
        ),
        ({"parameters": {}}, "lacks 'single.2.phi_q.weight'; feature map hedgehog has weight"),
        ({"parameters": {"single.2.phi_q.weight": torch.ones(4, 8, 7)}}, "has shape (4, 8, 7), the site has (4, 8, 8)"),
        ({"parameters": {"single.2.phi_q.bias": torch.ones(4)}}, "has 'single.2.phi_q.bias'"),
        (
            {"plan": plan(**{"single.0": HybridSpec(2, "elu1", 3)}), "parameters": {}},
            "does not fit single.0: feature map elu1 has 8 features here",
        ),
    ],
)
def test_a_student_that_does_not_fit_is_one_clear_sentence(changes, words):
    with pytest.raises(ValueError) as error:
        check_student(student(**changes), "flux", SITES)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_student_of_another_host():
    with pytest.raises(ValueError, match="the student is for host 'flux', this model is 'wan'"):
        check_student(student(), "wan", SITES)
