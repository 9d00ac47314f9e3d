"""Students with several candidates through the nodes: chosen under a budget, applied, saved, drawn, published."""

import math
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture(scope="session")
def kit(comfy):
    """The pack's own classes as ComfyUI loaded them."""
    candidates, specs = comfy.module("attention.students.candidates"), comfy.module("attention.specs")

    class Kit:
        clear, hybrid, dense = specs.ClearSpec, specs.HybridSpec, specs.DenseSpec
        candidate, student = candidates.Candidate, candidates.Candidates
        problem = comfy.module("attention.students.tensor_file").FileProblem
        load = staticmethod(comfy.module("attention.students.file").load_student)

        @staticmethod
        def pool(seed, size=2):
            return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * 0.1 + 1 / size**2

        def two_each(self, **fields):
            """Return a wide window and a narrow pooled one per site; the errors differ from site to site."""
            sites = {
                site: (
                    self.candidate(self.clear(9), 0.01 * (i + 1)),
                    self.candidate(self.clear(2, down_factor=2), 0.1 * (i + 1), {"pool": self.pool(i)}),
                )
                for i, site in enumerate(SITES)
            }
            return self.student("flux", sites, **{"base_model": "tiny", "recipe": {"transfer": {"seed": 1}}, **fields})

    return Kit()


@pytest.fixture
def run(comfy):
    """Run a node on a model of its own inference mode, with defaults filled in; returns its outputs."""

    def run(node_id, **inputs):
        with torch.inference_mode():
            return comfy.node(node_id)(**inputs).args

    return run


@pytest.fixture
def folder(comfy):
    """models/linearize; what a test puts there, and cards in the output folder, are removed."""
    import folder_paths

    path = Path(folder_paths.get_folder_paths("linearize")[0])
    path.mkdir(parents=True, exist_ok=True)
    cards = Path(folder_paths.get_output_directory()) / "linearize" / "hub" / "owner--repo"
    before = set(path.rglob("*"))
    yield path
    for made in sorted(set(path.rglob("*")) - before, reverse=True):
        made.rmdir() if made.is_dir() else made.unlink()
    shutil.rmtree(cards, ignore_errors=True)


@pytest.fixture
def shown(studio, monkeypatch):
    """What nodes show on themselves, in order."""
    told = []

    def show(node_id, notes=()):
        return lambda text: told.append("\n".join([text, *notes]))

    monkeypatch.setattr(studio.node_status, "show_on_node", show)
    return told


# --- Budget Plan ------------------------------------------------------------------------------------------------------


def test_a_budget_decides_and_what_comes_out_runs(run, kit, studio, shown):
    student, plan, text = run("LinearizeBudgetPlan", model=studio.model, student=kit.two_each(), budget=0.4)
    assert student.is_decided and 0 < len(student.sites) <= 4 and shown == [text]
    specs = plan.resolve(SITES)
    assert {s: spec for s, spec in specs.items() if spec != kit.dense()} == {
        site: found[0].spec for site, found in student.sites.items()
    }
    facts = student.recipe["budget"]
    assert facts["share"] <= 0.4 and facts["summed_error"] <= facts["homogeneous_error"] and facts["width"] == 1024
    assert student.recipe["transfer"] == {"seed": 1}, "what was known stays"
    assert f"attention kept: {facts['share']:.1%} of dense FLOPs, budget 40.0%" in text and "one kind alone" in text
    (patched,) = run("LinearizeApply", model=studio.model, attention=student)
    studio.sample(patched)
    assert {site: kind for site, (kind, _) in studio.ran(patched).items()} == {
        site: spec.kind for site, spec in specs.items()
    }


def test_the_size_and_the_method_count(run, kit, studio):
    chosen = {}
    for size in (512, 1024):
        student, _, _ = run(
            "LinearizeBudgetPlan", model=studio.model, student=kit.two_each(), budget=0.7, width=size, height=size
        )
        chosen[size] = student.recipe["budget"]["share"], sorted(student.sites)
    assert chosen[512] != chosen[1024]
    student, _, text = run(
        "LinearizeBudgetPlan", model=studio.model, student=kit.two_each(), budget=0.5, method="homogeneous"
    )
    assert len({found[0].spec for found in student.sites.values()}) == 1
    assert student.recipe["budget"]["summed_error"] == student.recipe["budget"]["homogeneous_error"]


def test_sites_are_kept_dense_by_name_and_by_error(run, kit, studio):
    common = {"model": studio.model, "student": kit.two_each(), "budget": 0.7}
    student, _, text = run("LinearizeBudgetPlan", **common, keep_dense="double")
    assert set(student.sites) <= {"single.0", "single.1"} and "4 candidates not used" in text
    student, _, _ = run("LinearizeBudgetPlan", **common, max_error=0.025)
    assert set(student.sites) <= {"double.0", "double.1"} and {f[0].spec for f in student.sites.values()} == {
        kit.clear(9)
    }


def test_a_loaded_student_has_one_candidate_per_site(run, kit, studio, folder):
    run("LinearizeSaveStudent", student=kit.two_each(), name="whole")
    _, loaded = run("LinearizeLoadStudent", model=studio.model, student="whole_00001_.safetensors")
    student, _, _ = run("LinearizeBudgetPlan", model=studio.model, student=loaded, budget=0.5)
    assert set(student.sites) < set(SITES) and student.base_model == "tiny"
    assert all(found[0].error == 0.01 * (SITES.index(site) + 1) for site, found in student.sites.items())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"budget": 0.0}, "budget is a share of dense attention, above 0 and at most 1, got budget=0.0"),
        ({"budget": 1.5}, "above 0 and at most 1, got budget=1.5"),
        ({"budget": 0.001}, "cannot be reached with these candidates, 0."),
        ({"keep_dense": "triple"}, "'triple' names no site of this model"),
        ({"student": lambda kit: kit.student("flux", {})}, "has no candidates to choose from"),
        (
            {"student": lambda kit: kit.student("wan", {"blocks.0": (kit.candidate(kit.clear(), 0.1),)})},
            "for host 'wan', this model is 'flux'",
        ),
        (
            {"student": lambda kit: kit.student("flux", {"single.0": (kit.candidate(kit.clear(), math.nan),)})},
            "holds no measured errors",
        ),
    ],
)
def test_budgets_that_are_refused(run, kit, studio, inputs, words):
    given = {"budget": 0.5, "student": kit.two_each(), **inputs}
    if callable(given["student"]):
        given["student"] = given["student"](kit)
    with pytest.raises(ValueError) as caught:
        run("LinearizeBudgetPlan", model=studio.model, **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- Apply and Save ---------------------------------------------------------------------------------------------------


def test_apply_takes_the_lowest_errors_and_says_so(run, kit, studio, notes):
    (patched,) = run("LinearizeApply", model=studio.model, attention=kit.two_each())
    assert {each.spec for each in studio.patching.runtime_of(patched).sites.values()} == {kit.clear(9)}
    assert "of 4 sites with several candidates the one of lowest error was taken; Budget Plan" in notes[-1]
    run("LinearizeApply", model=studio.model, attention=kit.two_each().chosen(dict.fromkeys(SITES, 1)))
    assert "candidates" not in notes[-1]


def test_what_was_saved_is_loaded_bit_for_bit_and_paints_the_same(run, kit, studio, folder, shown):
    learned = kit.two_each(fingerprint=torch.rand(256)).chosen({"double.0": 1, "single.1": 1, "single.0": 0})
    (text,) = run(
        "LinearizeSaveStudent", student=learned, name="wan/high", base_model=" black-forest-labs/FLUX.1-dev ",
        licence="mit", role="high", pair_id="pair 7",
    )  # fmt: skip
    path = folder / "wan" / "high_00001_.safetensors"
    saved = kit.load(path)
    assert set(saved.parameters) == {"double.0.pool", "single.1.pool"}
    for site in ("double.0", "single.1"):
        assert torch.equal(saved.parameters[f"{site}.pool"], learned.sites[site][0].parameters["pool"])
    assert torch.equal(saved.fingerprint, learned.fingerprint) and saved.plan == learned.student().plan
    assert (saved.base_model, saved.licence, saved.role, saved.pair_id) == (
        "black-forest-labs/FLUX.1-dev", "mit", "high", "pair 7",
    )  # fmt: skip
    assert saved.recipe == learned.recipe and saved.site_errors == {"double.0": 0.1, "single.0": 0.03, "single.1": 0.4}
    for words in (str(path), " kB", "clear radius 9 at single.0: error mean 0.03", "highest 0.4 at single.1",
                  "Load Linearized Attention, student wan"):  # fmt: skip
        assert words in text, words
    assert shown == [text]
    patched, _ = run("LinearizeLoadStudent", model=studio.model, student="wan/high_00001_.safetensors")
    (direct,) = run("LinearizeApply", model=studio.model, attention=learned)
    assert torch.equal(studio.sample(patched), studio.sample(direct))


def test_nothing_is_replaced_and_the_name_is_counted(run, kit, folder):
    paths = []
    for _ in range(3):
        (text,) = run("LinearizeSaveStudent", student=kit.two_each(), name="same.safetensors")
        paths.append(Path(re.match(r"saved (.+), [\d.]+ kB", text)[1]))
    assert [path.name for path in paths] == [f"same_0000{i}_.safetensors" for i in (1, 2, 3)]
    first = paths[0].read_bytes()
    (folder / "same_00005_.safetensors").write_bytes(b"mine")
    run("LinearizeSaveStudent", student=kit.two_each(licence="mit"), name="same")
    assert (folder / "same_00006_.safetensors").exists() and paths[0].read_bytes() == first
    assert (folder / "same_00005_.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["part", " part.safetensors "])
def test_an_unfinished_student_is_marked_in_its_name(run, kit, folder, name):
    recipe = {"transfer": {"unfinished": "after 3 of 8 updates"}}
    run("LinearizeSaveStudent", student=kit.two_each(recipe=recipe), name=name)
    assert [path.name for path in folder.glob("*part*")] == ["part_unfinished_00001_.safetensors"]


def test_a_student_saved_again_keeps_what_it_says(run, kit, studio, folder):
    run("LinearizeSaveStudent", student=kit.two_each(licence="mit", role="low", pair_id="p"), name="one")
    _, loaded = run("LinearizeLoadStudent", model=studio.model, student="one_00001_.safetensors")
    run("LinearizeSaveStudent", student=loaded, name="two")
    one, two = (kit.load(folder / f"{name}_00001_.safetensors") for name in ("one", "two"))
    for field in ("host", "plan", "role", "pair_id", "base_model", "licence", "recipe", "site_errors"):
        assert getattr(one, field) == getattr(two, field)
    assert (one.licence, one.role) == ("mit", "low")


def test_several_candidates_and_a_missing_licence_are_said(run, kit, folder):
    (text,) = run("LinearizeSaveStudent", student=kit.two_each(), name="several")
    assert "of 4 sites with several candidates the one of lowest error was taken" in text
    assert "no licence stated; name one before you share it" in text
    assert kit.load(folder / "several_00001_.safetensors").site_errors["double.0"] == 0.01


def test_an_error_that_nobody_measured_is_not_written(run, kit, folder):
    student = kit.student("flux", {"single.0": (kit.candidate(kit.clear(3), math.nan),)})
    (text,) = run("LinearizeSaveStudent", student=student, name="unmeasured")
    assert kit.load(folder / "unmeasured_00001_.safetensors").site_errors == {} and "no error measured" in text


@pytest.mark.parametrize(
    "name",
    ["", " ", "/etc/x", "../x", "a/../../x", "..", ".", "a//b", "a\\b", "C:\\x", "c:x", ".hidden", "a/.b", "x ", "a\0b",
     "a\nb", "con", "lpt1.x/y", "x." * 60, "sub/", "a|b", '"x"'],
)  # fmt: skip
def test_names_that_would_leave_the_folder_are_refused(run, kit, folder, name):
    before = set(folder.parent.rglob("*"))
    if name == "x ":  # spaces around a name are nobody's wish
        run("LinearizeSaveStudent", student=kit.two_each(), name=name)
        assert (folder / "x_00001_.safetensors").exists()
        return
    with pytest.raises(ValueError) as caught:
        run("LinearizeSaveStudent", student=kit.two_each(), name=name)
    assert "\n" not in str(caught.value) and "name is a file's name" in str(caught.value)
    assert set(folder.parent.rglob("*")) == before


def test_a_folder_that_leads_elsewhere_is_refused(run, kit, folder, tmp_path):
    (folder / "away").symlink_to(tmp_path, target_is_directory=True)
    try:
        with pytest.raises(ValueError, match="cannot save 'away/x' in") as caught:
            run("LinearizeSaveStudent", student=kit.two_each(), name="away/x")
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    finally:
        (folder / "away").unlink()


# --- Plot Site Errors -------------------------------------------------------------------------------------------------


def pixels(picture):
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    return (picture[0] * 255).round().int()


def test_bars_are_as_long_as_the_log_of_their_errors(comfy, run, kit):
    drawing = comfy.module("nodes.error_picture")
    blue = torch.tensor(comfy.module("nodes.plan_picture").colour_of("clear"))
    errors = [0.01, 0.1, 1.0]
    sites = {f"single.{i}": (kit.candidate(kit.clear(8), error),) for i, error in enumerate(errors)}
    (picture,) = run("LinearizeSiteErrors", student=kit.student("flux", sites))
    rows = (pixels(picture)[:, drawing.LEFT :] == blue).all(-1).sum(1)
    lengths = sorted({int(each) for each in rows[drawing.LINE * 4 :] if each})  # below the legend
    scale = drawing.Scale.of(errors)
    assert lengths == [scale.pixels(error) + 1 for error in errors]
    assert lengths[2] - lengths[1] == pytest.approx(lengths[1] - lengths[0], abs=1)


def test_57_sites_with_3_candidates_are_readable(comfy, run, kit):
    names = [f"double.{i}" for i in range(19)] + [f"single.{i}" for i in range(38)]
    specs = [kit.clear(8), kit.clear(16), kit.hybrid(4)]
    sites = {
        name: tuple(kit.candidate(spec, 10.0 ** -(1 + (i + n) % 4)) for n, spec in enumerate(specs))
        for i, name in enumerate(names)
    }
    (picture,) = run("LinearizeSiteErrors", student=kit.student("flux", sites))
    found = {tuple(colour) for colour in pixels(picture).reshape(-1, 3).unique(dim=0).tolist()}
    colours = comfy.module("nodes.error_picture").spec_colours(specs)
    assert set(colours.values()) <= found and len(set(colours.values())) == 3
    assert picture.shape[1] < 2000 and picture.shape[2] < 1200


@pytest.mark.parametrize(
    "errors", [(0.0,), (math.nan,), (0.0, math.nan, 1e-30, 5.0), (1.0,), (0.1, 0.1)], ids=lambda each: str(each)
)
def test_errors_that_have_no_logarithm_are_drawn(run, kit, errors):
    sites = {"single.0": tuple(kit.candidate(kit.clear(n + 1), error) for n, error in enumerate(errors))}
    (picture,) = run("LinearizeSiteErrors", student=kit.student("flux", sites))
    assert picture.isfinite().all()


def test_a_loaded_student_is_drawn_and_one_without_errors_refused(run, kit):
    specs = dict.fromkeys(SITES, kit.clear(9))
    one = kit.two_each().student(dict.fromkeys(SITES, 0))
    (picture,) = run("LinearizeSiteErrors", student=kit.student.of_student(replace(one, origin="a.safetensors"), specs))
    assert picture.shape[1] > 60
    nothing = kit.student.of_student(replace(one, origin="a.safetensors", site_errors={}), specs)
    for empty in (kit.student("flux", {}), nothing):
        with pytest.raises(ValueError, match="holds no errors to draw; Distill Attention measures them"):
            run("LinearizeSiteErrors", student=empty)


# --- Publish ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_dry_run_writes_the_card_and_sends_nothing(run, kit, folder, no_network):
    import folder_paths

    run("LinearizeSaveStudent", student=kit.two_each(), name="mine")
    (text,) = run("LinearizePublish", student="mine_00001_.safetensors", repo_id="owner/repo")
    card = Path(folder_paths.get_output_directory()) / "linearize" / "hub" / "owner--repo" / "README.md"
    assert card.read_text(encoding="utf-8") in text and "base model | tiny" in text
    for words in ("dry run, nothing was sent", "to owner/repo, private if it is made now", "- mine_00001_.safetensors",
                  f"- README.md, written to {card}", "no licence stated"):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"student": "none"}, "choose a student to publish, one of those in models/linearize; got 'none'"),
        ({"student": "../../etc/passwd"}, "choose a student to publish"),
        ({"repo_id": ""}, "a Hub repository is owner/name"),
        ({"repo_id": "../../x"}, "a Hub repository is owner/name"),
        ({"dry_run": False}, "nobody is logged in at"),
    ],
)
def test_publishing_that_is_refused(run, kit, folder, no_network, monkeypatch, inputs, words):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    run("LinearizeSaveStudent", student=kit.two_each(), name="mine")
    with pytest.raises(ValueError) as caught:
        run("LinearizePublish", **{"student": "mine_00001_.safetensors", "repo_id": "owner/repo", **inputs})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_node_takes_a_token(comfy):
    for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith("Linearize"):
            assert not [
                each.id for each in cls.define_schema().inputs if "token" in each.id and each.id != "min_tokens"
            ]


# --- names from another system ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["wan/more/high.safetensors", "wan\\more\\high.safetensors", "wan\\more/high.safetensors"]
)
def test_a_workflow_from_another_system_finds_its_student(run, kit, folder, comfy, name):
    """Its list wrote the folders of the file with other slashes."""
    run("LinearizeSaveStudent", student=kit.two_each(), name="wan/more/high")
    (folder / "wan" / "more" / "high_00001_.safetensors").rename(folder / "wan" / "more" / "high.safetensors")
    files = comfy.module("nodes.model_files")
    assert files.find(name) == folder / "wan" / "more" / "high.safetensors"
    assert files.state(name) == files.state("wan/more/high.safetensors") != (0, 0)
    for node in ("LinearizeLoadStudent", "LinearizePublish"):
        cls = comfy.nodes.NODE_CLASS_MAPPINGS[node]
        assert cls.validate_inputs(student=name) is True and cls.validate_inputs() is True
        assert cls.validate_inputs(student="wan\\none.safetensors").startswith("there is no wan\\none.safetensors in ")


@pytest.mark.parametrize("name", ["..\\..\\secret.txt", "../../secret.txt", "\\etc\\hosts"])
def test_other_slashes_lead_nowhere_else(folder, comfy, name):
    (folder.parent.parent / "secret.txt").write_text("x")
    try:
        assert comfy.module("nodes.model_files").find(name) is None
    finally:
        (folder.parent.parent / "secret.txt").unlink()
