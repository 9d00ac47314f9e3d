"""Plans and student files through their nodes: what runs, what is refused, and that refusing changes nothing."""

import math
from pathlib import Path

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture
def files(comfy):
    """Write students into models/linearize; they are removed at the end."""
    import folder_paths

    student_file = comfy.module("attention.students.file")
    folder = Path(folder_paths.get_folder_paths("linearize")[0])
    folder.mkdir(parents=True, exist_ok=True)
    made = []

    def write(name="student.safetensors", content=None, **fields):
        path = folder / name
        made.append(path)
        if content is not None:
            path.write_bytes(content)
        else:
            student_file.save_student(path, student_file.StudentFile(**fields))
        return name

    yield write
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def make(comfy):
    """Plans and specs of the pack as ComfyUI loaded it."""
    specs, plans = comfy.module("attention.specs"), comfy.module("attention.plans")

    def plan(host="flux", default=None, **rules):
        return plans.Plan(host, default or specs.DenseSpec(), tuple(rules.items()))

    plan.clear, plan.hybrid, plan.dense = specs.ClearSpec, specs.HybridSpec, specs.DenseSpec
    return plan


def low_rank(seed=1, rows=768):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, 4, generator=generator) * 0.1, torch.randn(4, 256, generator=generator) * 0.1
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, up @ down


def weight(model, key="double_blocks.0.img_attn.qkv.weight"):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model.get_model_object(f"diffusion_model.{key}").detach().clone()


def load(comfy, model, name, **inputs):
    with torch.inference_mode():
        return comfy.node("LinearizeLoadStudent")(model=model, student=name, **inputs).args


def test_a_student_runs_its_plan_parameters_and_deltas(comfy, studio, make, files):
    deltas, change = low_rank()
    pool = torch.randn(2, 2) * 0.1 + 0.25
    name = files(
        host="flux",
        plan=make(default=make.clear(3), **{"single.1": make.clear(5, down_factor=2), "double.1": make.dense()}),
        parameters={"single.1.pool": pool},
        deltas=deltas,
        base_model="tiny",
        licence="apache-2.0",
    )
    before = weight(studio.model)
    patched, student = load(comfy, studio.model, name)
    studio.sample(patched)
    assert studio.ran(patched) == {
        "double.0": ("clear", "torch"),
        "double.1": ("dense", "host"),
        "single.0": ("clear", "torch"),
        "single.1": ("clear", "torch"),
    }
    assert torch.allclose(weight(patched), before + change, atol=1e-6)
    runtime = studio.patching.runtime_of(patched)
    assert torch.equal(runtime.parameters.learned("single.1", torch.device("cpu")).pool, pool)
    assert [runtime.sites[site].trained for site in SITES] == [True, False, True, True]
    assert student.base_model == "tiny" and student.host == "flux"
    assert torch.equal(weight(studio.model), before)


def test_a_student_brings_its_feature_maps(comfy, studio, make, files):
    """The file's parameters run, cast from bf16, and another set of them paints another latent."""

    def maps(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"weight_1": (2, 128, 256), "bias_1": (2, 1, 256), "weight_2": (2, 256, 256), "bias_2": (2, 1, 256)}
        return {
            f"single.1.{part}.{name}": (torch.randn(shape, generator=generator) * 0.05).bfloat16()
            for part in ("phi_q", "phi_k")
            for name, shape in shapes.items()
        }

    latents = []
    for seed in (1, 1, 2):
        name = files(
            f"maps_{seed}.safetensors", host="flux", plan=make(**{"single.1": make.hybrid(3)}), parameters=maps(seed)
        )
        patched, _ = load(comfy, studio.model, name)
        latents.append(studio.sample(patched))
        runtime = studio.patching.runtime_of(patched)
        assert studio.ran(patched)["single.1"] == ("hybrid", "torch")
        assert runtime.sites["single.1"].trained and set(runtime.parameters.by_site()) == {"single.1"}
        stored = runtime.parameters.by_site()["single.1"].maps[1].weight_2
        assert torch.equal(stored.cpu(), maps(seed)["single.1.phi_k.weight_2"])
    assert torch.equal(latents[0], latents[1]) and (latents[0] - latents[2]).abs().max() > 1e-5


def test_a_student_on_another_model_through_apply(comfy, studio, make, files):
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=low_rank()[0])
    patched, student = load(comfy, studio.model, name)
    (again,) = comfy.node("LinearizeApply")(model=studio.model, attention=student).args
    assert torch.equal(studio.sample(patched), studio.sample(again))
    assert studio.ran(again) == studio.ran(patched)


def test_loras_before_and_after_a_student_add_up(comfy, studio, make, files):
    import comfy.sd as comfy_sd

    first, one = low_rank(2)
    second, two = low_rank(3)
    student, three = low_rank(4)
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=student)
    before = weight(studio.model)
    model = comfy_sd.load_lora_for_models(studio.model, None, first, 0.5, 0)[0]
    patched, _ = load(comfy, model, name)
    patched = comfy_sd.load_lora_for_models(patched, None, second, 1.0, 0)[0]
    assert torch.allclose(weight(patched), before + 0.5 * one + two + three, atol=1e-6)


def test_uniform_plans_chain_and_apply(comfy, studio, make):
    uniform = comfy.node("LinearizeUniformPlan")
    clear = {"kind": "clear", "radius": 3, "temporal_radius": 0, "down_factor": 1, "proportional": False}
    (plan,) = uniform(kind=clear, sites="all", host="flux").args
    (plan,) = uniform(kind={"kind": "dense"}, sites="double.0", host="flux", plan=plan).args
    (plan,) = uniform(kind={**clear, "radius": 7}, sites="single.1", host="flux", plan=plan).args
    assert plan.to_json()["sites"] == {
        "all": {**clear},
        "double.0": {"kind": "dense"},
        "single.1": {**clear, "radius": 7},
    }
    (patched,) = comfy.node("LinearizeApply")(model=studio.model, attention=plan).args
    studio.sample(patched)
    assert studio.ran(patched) == {"double.0": ("dense", "host"), **dict.fromkeys(SITES[1:], ("clear", "torch"))}
    equal = studio.clear(studio.clear(studio.model, radius=3, sites="double.1,single.0"), radius=7, sites="single.1")
    assert torch.equal(studio.sample(patched), studio.sample(equal))


def test_a_plan_with_a_radius_per_head(comfy, studio, make):
    split = comfy.module("attention.specs").radius_per_head((2, 6))
    (patched,) = comfy.node("LinearizeApply")(model=studio.model, attention=make(default=split)).args
    found = studio.sample(patched)
    assert studio.ran(patched) == dict.fromkeys(SITES, ("clear", "torch"))
    for radius in (2, 6):
        assert (found - studio.sample(studio.clear(studio.model, radius=radius))).abs().max() > 1e-3


def test_a_later_student_or_plan_takes_the_deltas_away(comfy, studio, make, files):
    one, two = low_rank(2), low_rank(3)
    first = files("first.safetensors", host="flux", plan=make(default=make.clear(3)), deltas=one[0])
    second = files("second.safetensors", host="flux", plan=make(default=make.clear(4)), deltas=two[0])
    before = weight(studio.model)
    patched, _ = load(comfy, studio.model, first)
    assert torch.allclose(weight(patched), before + one[1], atol=1e-6)
    patched, _ = load(comfy, patched, second)
    assert torch.allclose(weight(patched), before + two[1], atol=1e-6)
    assert torch.equal(weight(studio.clear(patched, radius=3, weights="none")), before)
    assert torch.allclose(weight(studio.clear(patched, radius=3, sites="single")), before + two[1], atol=1e-6)
    (applied,) = comfy.node("LinearizeApply")(model=patched, attention=make(default=make.clear(5))).args
    assert torch.equal(weight(applied), before)


CHANGED = {  # a weight that a student changes: the sites whose attention it is part of
    "double_blocks.0.img_attn.qkv.weight": {"double.0"},
    "double_blocks.0.txt_attn.proj.bias": {"double.0"},
    "double_blocks.1.img_attn.norm.query_norm.weight": {"double.1"},
    "single_blocks.0.linear1.weight": {"single.0"},
    "single_blocks.0.linear2.weight": {"single.0"},
    "double_blocks.0.img_mlp.0.weight": set(),
    "final_layer.linear.weight": set(),
}


def whole_changes(model):
    """Return deltas that add 1 to each of the weights above."""
    shapes = {key: model.model_state_dict()[f"diffusion_model.{key}"].shape for key in CHANGED}
    part = {"weight": "diff", "bias": "diff_b"}
    return {f"diffusion_model.{key.rpartition('.')[0]}.{part[key.rpartition('.')[2]]}": torch.ones(shape)
            for key, shape in shapes.items()}  # fmt: skip


def still_changed(model, base):
    return {key for key in CHANGED if not torch.equal(weight(model, key), base[key])}


def replace(comfy, studio, make, model, node, sites):
    """Return a model whose `sites` a node runs untrained."""
    if node == "LinearizeApply":
        return comfy.node(node)(model=model, attention=make(**{sites: make.clear(5)}))[0]
    inputs = {"weights": "none", "radius": 5} if node == "LinearizeCLEAR" else {"feature_map": "elu1"}
    return comfy.node(node)(model=model, sites=sites, **inputs)[0]


@pytest.mark.parametrize("node", ["LinearizeCLEAR", "LinearizeHybrid", "LinearizeLinear", "LinearizeApply"])
def test_a_node_behind_a_student_takes_out_the_weights_of_its_sites(comfy, studio, make, files, notes, node):
    """All four nodes do, site by site, and say so; what is no site's attention goes with the last trained site."""
    base = {key: weight(studio.model, key) for key in CHANGED}
    plan = make(default=make.clear(3), **{"double.1": make.dense()})
    patched, _ = load(comfy, studio.model, files(host="flux", plan=plan, deltas=whole_changes(studio.model)))
    assert still_changed(patched, base) == set(CHANGED)
    words = "trained weights of {} that an earlier node put in were taken out"
    for sites, gone in (("double.0", {"double.0"}), ("single.1,double.0", {"double.0"}), ("double.1", {"double.1"})):
        told = {"single.1,double.0": "double.0, single.1", "double.1": ""}.get(sites, sites)
        model = replace(comfy, studio, make, patched, node, sites)
        assert still_changed(model, base) == {key for key, owners in CHANGED.items() if not owners & gone}, sites
        assert (words.format(told) in notes[-1]) if told else "taken out" not in notes[-1]
    first = replace(comfy, studio, make, patched, node, "double.0")
    second = replace(comfy, studio, make, first, node, "double.0,single.0")
    assert words.format("single.0") in notes[-1], "what is out already is not named again"
    assert still_changed(second, base) == {
        "double_blocks.1.img_attn.norm.query_norm.weight", "double_blocks.0.img_mlp.0.weight",
        "final_layer.linear.weight",
    }  # fmt: skip
    assert still_changed(replace(comfy, studio, make, second, node, "single.1"), base) == set()
    assert still_changed(patched, base) == set(CHANGED), "the student's own model stays as it was"
    studio.sample(second)
    assert [studio.ran(second)[site][0] == "clear" for site in SITES] == [
        node in ("LinearizeCLEAR", "LinearizeApply"), False, node in ("LinearizeCLEAR", "LinearizeApply"), True,
    ]  # fmt: skip


def test_a_weight_of_two_sites_stays_while_one_is_trained(comfy, studio, make, files, monkeypatch):
    host, _ = studio.patching.host_of(studio.model)
    shared = ("double_blocks.0.img_attn",)
    monkeypatch.setattr(type(host), "site_weights", lambda *_: {"double.0": shared, "double.1": shared})
    before = weight(studio.model)
    deltas, change = low_rank()
    patched, _ = load(comfy, studio.model, files(host="flux", plan=make(default=make.clear(3)), deltas=deltas))
    one = studio.clear(patched, radius=5, weights="none", sites="double.0")
    assert torch.allclose(weight(one), before + change, atol=1e-6)
    both = studio.clear(one, radius=5, weights="none", sites="double.1")
    assert torch.equal(weight(both), before)


def test_a_student_behind_a_student_says_that_it_replaces_it(comfy, studio, make, files, notes):
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=low_rank()[0])
    patched, student = load(comfy, studio.model, name)
    assert "taken out" not in notes[-1]
    comfy.node("LinearizeApply")(model=patched, attention=student)
    assert "trained weights of double.0-1, single.0-1 that an earlier node put in were taken out" in notes[-1]


def test_a_whole_weight_lies_under_earlier_loras(comfy, studio, make, files):
    import comfy.sd as comfy_sd

    lora, change = low_rank(2)
    whole = torch.randn(768, 256, generator=torch.Generator().manual_seed(4)) * 0.1
    name = "diffusion_model.double_blocks.0.img_attn.qkv.set_weight"
    student = files(host="flux", plan=make(default=make.clear(3)), deltas={name: whole})
    model = comfy_sd.load_lora_for_models(studio.model, None, lora, 0.5, 0)[0]
    assert torch.allclose(weight(load(comfy, model, student)[0]), whole + 0.5 * change, atol=1e-6)


def test_the_receipt_names_the_file_also_through_apply(comfy, studio, make, files):
    receipt = comfy.module("patching.receipt")
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=low_rank()[0])
    patched, student = load(comfy, studio.model, name)
    (applied,) = comfy.node("LinearizeApply")(model=studio.model, attention=student).args
    for model in (patched, applied):
        studio.sample(model, steps=1)
        (origin,) = receipt.receipt_of(studio.patching.runtime_of(model))["weights"]
        assert origin.startswith(f"{name} sha256:") and len(origin.split(":")[1]) == 64


def test_a_student_that_is_replaced_while_it_loads_has_no_hash(comfy, studio, make, files, monkeypatch):
    node, receipt = comfy.module("nodes.load_student"), comfy.module("patching.receipt")
    read = node.load_student
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=low_rank()[0])

    def meanwhile(path):
        loaded = read(path)
        files(name, host="flux", plan=make(default=make.clear(3)), deltas=low_rank(2)[0])
        return loaded

    monkeypatch.setattr(node, "load_student", meanwhile)
    patched, _ = load(comfy, studio.model, name)
    studio.sample(patched, steps=1)
    assert receipt.receipt_of(studio.patching.runtime_of(patched))["weights"] == [name]


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "\u202eabc", "x" * 3000])
def test_what_a_student_says_of_itself_is_one_line_each(comfy, studio, make, files, notes, text):
    apply = comfy.module("nodes.apply")
    plan = make(default=make.clear(3))
    student = comfy.module("attention.students.file").StudentFile("flux", plan, base_model=text, licence=text)
    note = apply.student_note(student)
    assert note.isprintable() and len(note) < 500
    with pytest.raises(ValueError) as error:
        apply.apply_plan(studio.model, make(host=text), None)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_a_node_shows_lines_and_nothing_else(comfy, studio, monkeypatch):
    from server import PromptServer

    sent = []
    told = type("Told", (), {"send_sync": staticmethod(lambda _, status, __: sent.append(status["text"]))})
    monkeypatch.setattr(PromptServer, "instance", told, raising=False)
    studio.node_status.show_on_node("3", ["a\x1bb"])("first\nsecond\u202e")
    assert sent == ["first\nsecond\\u202e\na\\x1bb"]


def test_a_plan_changes_only_the_sites_it_names(comfy, studio, make, files):
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=low_rank()[0])
    patched, _ = load(comfy, studio.model, name)
    (mixed,) = comfy.node("LinearizeApply")(model=patched, attention=make(**{"single.1": make.clear(9)})).args
    sites = studio.patching.runtime_of(mixed).sites
    assert [sites[site].spec.radius for site in SITES] == [3, 3, 3, 9]
    assert [sites[site].trained for site in SITES] == [True, True, True, False]


@pytest.mark.parametrize("apart", ["same", "fine-tune", "other"])
def test_another_base_is_a_note_not_a_refusal(comfy, studio, make, files, apart):
    apply = comfy.module("nodes.apply")
    stored = apply.model_fingerprint(studio.model) * {"same": 1.001, "fine-tune": 1.15, "other": 3.0}[apart]
    name = files(host="flux", plan=make(default=make.clear(3)), fingerprint=stored)
    patched, student = load(comfy, studio.model, name)
    notes = " ".join(apply.base_notes(studio.model, student))
    assert {"same": notes == "", "fine-tune": "is a fine-tune" in notes, "other": "not the student's base" in notes}[
        apart
    ]
    studio.sample(patched)
    assert studio.ran(patched) == dict.fromkeys(SITES, ("clear", "torch"))


def test_the_fingerprint_is_of_the_base_also_while_it_is_patched(comfy, studio):
    apply = comfy.module("nodes.apply")
    before = apply.model_fingerprint(studio.model)
    patched = studio.model.clone()
    key = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight"
    patched.add_patches({key: ("diff", (torch.ones(128),))})
    studio.sample(patched)
    assert torch.equal(apply.model_fingerprint(patched), before)


def wrong(make):
    """Return cases: fields of a student (or raw bytes), and words of the sentence."""
    clear = make(default=make.clear(3))
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    return {
        "another host": ({"host": "wan", "plan": make("wan")}, "host 'wan', this model is 'flux'"),
        "unknown site": ({"host": "flux", "plan": make(**{"single.9": make.clear(3)})}, "names no site of this model"),
        "a map without parameters": (
            {"host": "flux", "plan": make(default=make.hybrid())},
            "the student lacks 'double.0.phi_q",
        ),
        "pool of no site": (
            {"host": "flux", "plan": clear, "parameters": {"triple.0.pool": torch.ones(2, 2)}},
            "triple.0.pool",
        ),
        "unknown module": (
            {"host": "flux", "plan": clear, "deltas": {"diffusion_model.nothing.diff": torch.ones(2)}},
            "which this model does not have",
        ),
        "wrong shape": (
            {"host": "flux", "plan": clear, "deltas": low_rank(rows=700)[0]},
            f"{name}.lora_up.weight has shape",
        ),
        "bias of a layer without one": (
            {
                "host": "flux",
                "plan": clear,
                "deltas": {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff_b": torch.ones(128)},
            },
            "query_norm.diff_b, which this model does not have",
        ),
        "pickle": (b"\x80\x04\x95pickled", "pickle"),
        "truncated": (b"\x40\x00\x00\x00\x00\x00\x00\x00{", "student.safetensors"),
        "empty": (b"", "student.safetensors"),
    }


@pytest.mark.parametrize(
    "case",
    ["another host", "unknown site", "a map without parameters", "pool of no site", "unknown module", "wrong shape",
     "bias of a layer without one", "pickle", "truncated", "empty"],
)  # fmt: skip
def test_wrong_files_are_one_sentence_and_the_model_is_untouched(comfy, studio, make, files, case):
    fields, words = wrong(make)[case]
    name = files(content=fields) if isinstance(fields, bytes) else files(**fields)
    options = dict(studio.model.model_options["transformer_options"])
    patches = {key: list(value) for key, value in studio.model.patches.items()}
    with pytest.raises(ValueError) as error:
        load(comfy, studio.model, name)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert studio.model.model_options["transformer_options"] == options and studio.model.patches == patches


def test_values_that_are_not_numbers_are_refused(comfy, studio, make, files):
    deltas, _ = low_rank()
    name = files(host="flux", plan=make(default=make.clear(3)), deltas=deltas)
    import folder_paths

    path = Path(folder_paths.get_full_path("linearize", name))
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # an fp32 NaN in the last tensor
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(comfy, studio.model, name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"name": "none"}, "choose a student in"),
        ({"name": "none", "hub_file": "not a path"}, "owner/repo"),
        ({"name": "none", "hub_file": "owner/repo/student.safetensors"}, "allow_download"),
    ],
)
def test_nothing_is_fetched_without_a_click(comfy, studio, monkeypatch, inputs, words):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises((ValueError, RuntimeError)) as error:
        load(comfy, studio.model, inputs.pop("name"), **inputs)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_plan_for_another_host_is_refused(comfy, studio, make):
    with pytest.raises(ValueError, match="the plan is for host wan, this model is flux"):
        comfy.node("LinearizeApply")(model=studio.model, attention=make("wan"))


def test_a_plan_for_any_host_takes_the_models(comfy, studio):
    """Beneath a plan for a named host it is that host's; what names no site of the model is a sentence."""
    uniform, kind = comfy.node("LinearizeUniformPlan"), {"kind": "clear", "radius": 2}
    plan = uniform(kind=kind, sites="double", host="auto", plan=None)[0]
    assert plan.host == "auto" and type(plan).from_json(plan.to_json()) == plan
    (model,) = comfy.node("LinearizeApply")(model=studio.model, attention=plan).args
    studio.sample(model)
    assert studio.ran(model) == dict.fromkeys(SITES[:2], ("clear", "torch"))
    named = uniform(kind=kind, sites="blocks", host="wan", plan=plan)[0]
    assert named.host == uniform(kind=kind, sites="all", host="auto", plan=named)[0].host == "wan"
    unknown = uniform(kind=kind, sites="blocks.3", host="auto", plan=None)[0]
    with pytest.raises(ValueError, match="'blocks.3' names no site of this model, which has double.0-1, single.0-1"):
        comfy.node("LinearizeApply")(model=studio.model, attention=unknown)


def test_a_saved_student_is_found_again_after_a_restart_of_the_list(comfy, studio, make, files):
    name = files("found.safetensors", host="flux", plan=make(default=make.clear(3)))
    options = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeLoadStudent"].define_schema().inputs[1].options
    assert name in options and options[0] == "none"
    assert math.isfinite(float(weight(studio.model).norm()))


def test_two_servers_that_save_one_name_both_keep_their_file(comfy, studio, make, tmp_path, monkeypatch):
    """Both took the same free number: the second one's file gets the next, and replaces nothing."""
    model_files, student_file = comfy.module("nodes.model_files"), comfy.module("attention.students.file")
    candidates = comfy.module("attention.students.candidates")
    student = candidates.Candidates("flux", {"single.0": (candidates.Candidate(make.clear(3), math.nan),)})
    taken = tmp_path / "twice_00001_.safetensors"
    paths = iter([taken, taken, tmp_path / "twice_00002_.safetensors"])
    monkeypatch.setattr(model_files, "new_path", lambda name: next(paths))
    monkeypatch.setattr(model_files, "shown_name", lambda path: path.name)
    texts = [
        comfy.node("LinearizeSaveStudent")(student=student, name="twice", licence=licence).result[0]
        for licence in ("mit", "apache-2.0")
    ]
    found = {path.name: student_file.load_student(path).licence for path in tmp_path.iterdir()}
    assert found == {"twice_00001_.safetensors": "mit", "twice_00002_.safetensors": "apache-2.0"}
    assert ["twice_0000" + text.split("twice_0000")[1][0] for text in texts] == ["twice_00001", "twice_00002"]
