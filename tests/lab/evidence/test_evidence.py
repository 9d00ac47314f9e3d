"""The evidence: distances against closed forms, verdicts on rows made up for them, a page that tells what is stored."""

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from linearize.lab.demo.nodes.clip_latents import to_comfyui
from linearize.lab.evidence import claims, clips, degrees, experiments, measures, rows, run, sheets, tables
from linearize.lab.evidence.laboratory import Laboratory, unseen

EVIDENCE = Path(__file__).resolve().parents[3] / "lab" / "evidence"


def row(suite, method, training, note, seed, error):
    names = ("suite", "method", "training", "note", "seed", "error")
    values = dict(zip(names, (suite, method, training, note, str(seed), str(error)), strict=True))
    return {**values, "psnr": str(20 - 10 * float(error)), "tokens": "32", "scale": "1.0", "outcome": ""}


def test_frechet_distance_of_gaussians():
    """Two sets that differ by a shift and a scale: |shift|^2 + sum (s1 - s2)^2, with the ridge in both variances."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    unit = unit - unit.mean(0)
    unit = unit @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(unit.T))).T  # covariance exactly 1
    first, second = 3 * unit, unit + 2.0
    assert measures.frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    ridge = 0.2 * torch.cat((first, second)).var(0).mean()
    expected = 5 * 4.0 + 5 * ((9 + ridge).sqrt() - (1 + ridge).sqrt()) ** 2
    assert measures.frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_errors_are_energies_by_level():
    teacher = torch.ones(2, 3, 4, 5)
    teacher[:, 2] *= 2
    student = teacher.clone()
    student[:, 1] += 0.5
    error, levels = measures.relative_error(student, teacher)
    assert levels == pytest.approx([0, 0.25, 0]) and error == pytest.approx(0.25 / (1 + 1 + 4))


def test_verdicts():
    windows = claims.Claim("x", "y", (claims.Group("s", "a"), claims.Group("s", "b")))
    rows = [row("s", "a", "all stages", "", seed, 0.4) for seed in range(3)]
    assert windows.verdict(rows) == "not measured"
    rows += [row("s", "b", "all stages", "", seed, error) for seed, error in enumerate((0.1, 0.2, 0.5))]
    assert windows.verdict(rows) == "mixed: 0.4000 > 0.2667, 2 of 3 seeds"
    assert windows.verdict(rows, claims.PICTURES) == "mixed: 16.00 < 17.33, 2 of 3 seeds", "more PSNR is better"
    twice = claims.Claim("x", "y", windows.groups, 2.0)
    assert twice.verdict(rows) == "not reproduced: 0.4000 > 0.2667 (error 1.50 times, needed 2), 2 of 3 seeds"
    tolerant = claims.Claim("x", "y", windows.groups[::-1], 1 / 1.6)
    assert tolerant.verdict(rows) == "mixed: 0.2667 < 0.4000 (error 0.67 times, needed 0.62), 1 of 3 seeds"
    assert claims.Claim("x", "y", windows.groups[::-1], 1 / 1.4).verdict(rows).startswith("not reproduced")
    assert claims.Claim("x", "y", windows.groups[::-1]).verdict(rows).startswith("not reproduced: 0.2667 < 0.4000, 1")
    rows.append(row("s", "b", "all stages", "", 2, 0.05))
    assert windows.verdict(rows) == "reproduced: 0.4000 > 0.1167, 3 of 3 seeds", "the newest row of a seed counts"
    rows[-1]["outcome"] = "given back"
    assert windows.verdict(rows).endswith("3 of 3 seeds; 1 of these runs did not go as the recipe says")
    start = claims.Claim("x", "y", (claims.Group("s", "a", "untrained"), claims.Group("s", "b")))
    only = [each for each in rows if each["method"] == "b"] + [row("s", "a", "untrained", "", 0, 0.15)]
    assert start.verdict(only).startswith("mixed: 0.1500 > 0.1167, 2 of 3"), "one untrained row stands for all seeds"
    assert windows.verdict([row("s", "a", "all stages", "", 0, 1), row("s", "b", "all stages", "", 1, 1)]) == (
        "not measured with a common seed"
    )


def test_the_best_of_several_settings():
    best = claims.Best((claims.Group("s", "a", note="x"), claims.Group("s", "a", note="y")))
    rows = [row("s", "a", "all stages", "x", seed, 0.3) for seed in range(2)]
    assert best.rows(rows) == {}, "what was tried of one setting alone is not the best of several"
    rows += [row("s", "a", "all stages", "y", 0, 0.2)]
    assert best.rows(rows) == {"0": rows[2]}
    rows[2]["psnr"] = "1.0"
    assert best.rows(rows, claims.PICTURES) == {"0": rows[0]}, "the best by what is measured"


def test_rows_of_another_scale_have_a_table_of_their_own():
    rows = [row("methods", "clear r=2", "all stages", "", 0, 0.3) | {"scale": "1.0"}]
    rows += [{**rows[0], "scale": "10.0", "error": "0.1"}]
    assert [list(by) for by in tables.by_scale(rows).values()] == [rows[:1], rows[1:]]
    more = {"ssim": "1", "frechet": "1", "flops": "1", "updates": "1", "structure": "{}", "outcome": "given back",
            "errors_by_level": '{"0.2": 0.5, "0.8": 0.1, "0.05": 9}'}  # fmt: skip
    lines = tables.suite_table([each | more for each in rows], "methods").splitlines()[2:]
    assert lines == [
        "| clear r=2 | all stages | 1 of 1 given back | 1 | 0.3000 | 0.3000 | 17.0 | 1.000 | 1 | 1.000 | 1 |",
        "| clear r=2 | all stages | 10 times the updates, 1 of 1 given back | 1 | 0.1000 | 0.3000 | 17.0 | 1.000 | 1 "
        "| 1.000 | 1 |",
    ]
    assert "With 10 times the updates:" in tables.claims_table(rows)


def test_an_experiment_that_fails_keeps_no_other_from_its_row(monkeypatch):
    stored = []
    monkeypatch.setattr(run, "append", lambda path, columns, rows: stored.extend((path, columns, row) for row in rows))
    monkeypatch.setattr(run, "store_dense", lambda judge: None)
    judged = {"error": 0.5, "psnr": 20.0}
    monkeypatch.setattr(run, "Judge", lambda laboratory, tokens: SimpleNamespace(row=lambda *given: dict(judged)))
    names = ("x", "y", "z")
    wanted = [experiments.Experiment("s", experiments.Method(name, ()), experiments.UNTRAINED) for name in names]

    def student(experiment):
        if experiment.method.name == "y":
            raise ValueError("no such thing")

    laboratory = SimpleNamespace(student=student, scale=10.0, device="cpu", flops_kept=lambda *given: 0.25)
    assert run.measure(laboratory, wanted, -1) == [] == stored, "the time was up before the first"
    assert run.measure(laboratory, wanted, 60) == ["s y untrained 0  32: no such thing"]
    assert [row["method"] for _, _, row in stored] == ["x", "z"]
    path, columns, row = stored[0]
    assert path == rows.RESULTS and set(row) <= set(columns) and row["flops"] == 0.25
    assert run.key_of({name: str(value) for name, value in row.items()}) == (*wanted[0].key, "10.0"), (
        "it counts as done"
    )


def test_rows_are_appended_whole(monkeypatch, tmp_path):
    """What a kill left of a line is taken away, and the header stands once."""
    monkeypatch.setattr(rows, "LOCKS", tmp_path / "locks")
    file = tmp_path / "rows.csv"
    rows.append(file, ("a", "b"), [{"a": 1, "b": "x, y"}])
    file.write_bytes(file.read_bytes() + b"2,half of a li")
    rows.append(file, ("a", "b"), [{"a": 2, "b": ""}, {"a": 3, "b": "z"}])
    assert file.read_text(encoding="utf-8") == 'a,b\n1,"x, y"\n2,\n3,z\n'
    assert rows.rows_of(file)[0] == {"a": "1", "b": "x, y"} and rows.rows_of(tmp_path / "none.csv") == []


def test_every_claim_asks_for_experiments_that_are_run():
    every = [each for suite in experiments.SUITES.values() for each in suite()]
    keys = [each.key for each in every]
    assert len(set(keys)) == len(keys) > 100
    known = {(each.suite, each.method.name, each.training, each.note, each.tokens) for each in every}
    groups = [one for claim in claims.CLAIMS for group in claim.groups for one in getattr(group, "groups", (group,))]
    assert len(groups) > 40 and set(experiments.TEACHER) == set(experiments.SUITES)
    for group in groups:
        assert (group.suite, group.method, group.training, group.note, group.tokens) in known, group


class Nodes:
    """Stands in for a laboratory's nodes: keeps what they are given."""

    def __init__(self):
        self.given = {}

    def node(self, node_id):
        def call(**inputs):
            self.given[node_id] = inputs
            return (SimpleNamespace(sites={"a": ()}, chosen=lambda choice: choice),)

        return call


def inputs_of(experiment, scale=1.0):
    """Return what the nodes are given for an experiment, by node id."""
    nodes, laboratory = Nodes(), Laboratory.__new__(Laboratory)
    laboratory.teacher, laboratory.model, laboratory.scale = SimpleNamespace(host="flux"), None, scale
    laboratory.module = lambda name: importlib.import_module(f"linearize.{name}")
    laboratory.samples, laboratory.node = lambda source: source, nodes.node
    laboratory.student(experiment)
    return nodes.given


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_recipes_take_equal_updates(scale):
    """In what the nodes are told, for every recipe, with and without a change; `num_updates` says the same."""
    tried = experiments.recipes() + experiments.settings() + experiments.curve()
    assert len(tried) > 35
    for each in tried:
        given = inputs_of(each, scale)
        told = given["LinearizeTransfer"]["updates"]
        told += given["LinearizeFinetune"]["updates"] + given["LinearizeFinetune"]["block_updates"]
        assert told == experiments.num_updates(each, scale)
        assert abs(told - experiments.EQUAL * each.factor * scale) <= 1, each.key


def test_a_training_runs_the_stages_of_its_name():
    for training, (matrices, maps, blocks, end) in experiments.TRAININGS.items():
        given = inputs_of(experiments.Experiment("x", experiments.hybrid(4), training, 2))
        if training == experiments.UNTRAINED:
            assert given == {}
            continue
        transfer, finetune = given["LinearizeTransfer"], given.get("LinearizeFinetune")
        assert (transfer["output_draws"] > 0, transfer["updates"] > 0) == (matrices, maps) and transfer["seed"] == 2
        assert (finetune is not None) == (blocks or end)
        if finetune:
            assert (finetune["block_updates"] > 0, finetune["updates"] > 0, finetune["seed"]) == (blocks, end, 2)


def test_settings_and_noise_levels_change_one_thing():
    """What is compared is all that experiments differ in, but for the seed."""
    own = {each.method.name + each.note: each for each in experiments.recipes() if each.seed == 0}
    for each in experiments.settings():
        recipe, _, change = each.note.partition(", ")
        base = own[each.method.name + recipe]
        changes = {part.split()[0] for part in change.split(", ")}
        differing = {name for name, value in each.finetune.items() if base.finetune[name] != value}
        wanted = {"rate": {"map_rate", "delta_rate"}, "even": {"preset"}, "middle": {"preset"}, "half": {"updates"}}
        wanted |= {"no": set(), "unchanged": set()}
        assert differing == set().union(*(wanted[change] for change in changes)), each.note
        if "preset" in differing:
            assert each.finetune["preset"] == f"{base.finetune['preset']}, {(changes & {'even', 'middle'}).pop()}"
        differing = {name for name, value in each.transfer.items() if base.transfer.get(name) != value}
        wanted = {"no": {"output_draws"}, "half": {"updates"}}
        assert differing == set().union(*(wanted.get(change, set()) for change in changes)), each.note
    draws = [each for each in experiments.noise_levels() if each.seed == 0]
    assert [each.finetune["preset"] for each in draws] == [f"ours, {each}" for each in experiments.NOISE_LEVELS]
    plain = [replace(each, note="", finetune={**each.finetune, "preset": ""}) for each in draws]
    assert len(plain) == 3 and plain[1:] == plain[:-1]


def test_maps_of_other_degrees(monkeypatch):
    """Degree 2 is the pack's own map; part n of another is its part of degree 1 raised to the power n."""
    from linearize.attention.kinds import feature_maps
    from linearize.attention.spec_json import spec_from_json

    for degree in degrees.DEGREES:
        monkeypatch.setitem(feature_maps.MAPS, degrees.name_of(degree), None)  # forgotten after the test
    degrees.add_degrees(feature_maps)
    x, own = torch.randn(2, 3, 7, 16), feature_maps.Polynomial(3, 16)
    own.reset(torch.Generator().manual_seed(1))
    found = {}
    for degree in degrees.DEGREES:
        name = degrees.name_of(degree)
        assert spec_from_json({"kind": "hybrid", "rate": 4, "feature_map": name}).feature_map == name
        each = feature_maps.MAPS[name](3, 16)
        each.load_state_dict(own.state_dict())
        found[degree] = each(x)
    assert torch.equal(found[2], own(x))
    first = found[1].chunk(4, -1)
    torch.testing.assert_close(found[4], torch.cat([part**n for n, part in enumerate(first, 1)], -1))
    assert not torch.allclose(found[1], found[2])


def test_the_table_of_costs(monkeypatch):
    row = {"machine": "m", "torch": "t", "commit": "c", "teacher": "lake", "seconds": "1.0"}
    rows = [
        {**row, "method": "dense", "what": "call", "tokens": "32", "ratio": "1.00", "peak_mib": "7"},
        {**row, "method": "a", "what": "call", "tokens": "32", "ratio": "0.50", "peak_mib": "3"},
        {**row, "method": "a", "what": "call", "tokens": "64", "ratio": "0.25", "peak_mib": ""},
        {**row, "method": "a", "what": "update of stage 1", "tokens": "32", "ratio": "2.00", "peak_mib": "9"},
        {
            **row,
            "method": "other",
            "teacher": "clips",
            "what": "call",
            "tokens": "16",
            "ratio": "1.00",
            "peak_mib": "1",
        },
    ]
    monkeypatch.setattr(tables, "costs", lambda: rows)
    assert tables.costs_table("lake").splitlines()[2:] == [
        "| dense | 1.00 (7 MiB) |  |  |", "| a | 0.50 (3 MiB) | 0.25 | 2.00 (9 MiB) |", "",
        "Taken on: m, torch t, commit c.",
    ]  # fmt: skip
    rows.append({**rows[0], "machine": "n", "ratio": "1.01"})
    assert tables.costs_table("lake").splitlines()[7:] == [
        "| method | call, 32 tokens wide |", "|---|---:|", "| dense | 1.01 (7 MiB) |", "",
        "Taken on: n, torch t, commit c.",
    ]  # fmt: skip
    rows.clear()
    assert tables.costs_table("lake") == "Not measured yet."


@pytest.mark.parametrize("suite", ["budgets", "video budgets"])
def test_budgets_can_be_reached_and_the_planners_differ(suite):
    """With errors that fall as costs rise, and sites that differ in how much they need."""
    from linearize.attention import Segment, TokenLayout, attention_cost, grid_segment
    from linearize.attention.planning.knapsack import Option, SiteOptions, plan_under_budget
    from linearize.attention.spec_json import spec_from_json
    from linearize.attention.specs import DenseSpec

    grids = {"budgets": (Segment("text", 12), grid_segment("main", 1, 32, 32)),
             "video budgets": (grid_segment("main", 5, 12, 16),)}  # fmt: skip
    layout = TokenLayout.of(grids[suite])
    dense = attention_cost(DenseSpec(), layout, 2, 128).flops
    for each in experiments.SUITES[suite]():
        specs = [spec_from_json(spec) for spec in each.method.specs]
        costs = [attention_cost(spec, layout, 2, 128).flops for spec in specs]
        assert max(costs) < dense
        sites = [
            SiteOptions(str(need), dense, tuple(
                Option(number, spec, need * (1 - cost / dense), cost)
                for number, (spec, cost) in enumerate(zip(specs, costs, strict=True))
            ))
            for need in (1, 3, 9, 27)
        ]  # fmt: skip
        budget = each.method.budget
        optimal, homogeneous = (plan_under_budget(sites, budget, name)[0] for name in ("optimal", "homogeneous"))
        assert optimal.choice != homogeneous.choice and optimal.error < homogeneous.error
        assert homogeneous.share <= optimal.share <= budget


def test_stage_1_runs_where_there_is_something_to_learn():
    from linearize.attention.spec_json import spec_from_json
    from linearize.attention.specs import ClearSpec
    from linearize.attention.students.learned import new_maps

    for method in experiments.METHODS + experiments.VIDEO_METHODS:
        for spec in map(spec_from_json, method.specs):
            if isinstance(spec, ClearSpec):
                learns = spec.down_factor > 1
            else:
                learns = any(True for phi in new_maps(spec, 2, 16) for _ in phi.parameters())
            assert method.has_maps == learns, method.name


def test_the_video_teacher_reads_its_own_frames(monkeypatch):
    """Drawn scenes, through the latents as ComfyUI hands them around, are judged as right; wrong captions are not."""
    teacher = clips.Clips(None)
    scenes = teacher.draw(6, 3)
    empty = teacher.empty(teacher.size, 6)["samples"]
    latents = teacher.drawn_latents(scenes.captions(), 4)
    assert latents.shape == empty.shape and teacher.dimensions(teacher.size) == (256, 192, 17)
    pictures = teacher.pictures(to_comfyui(latents))
    assert pictures.shape == (6 * 17, 48, 64, 3) and teacher.shown(pictures).shape == (4, 48, 64, 3)
    assert teacher.views(pictures).shape == teacher.drawn_views(scenes).shape == (6, teacher.channels, 48, 64)
    others = unseen(teacher.draw(60, 5), scenes.captions(), 4)
    assert len(others.captions()) == 4 and not set(others.captions()) & set(scenes.captions())
    with pytest.raises(ValueError, match="only 0 of the scenes"):
        unseen(scenes, scenes.captions(), 1)
    found = teacher.structure(pictures, scenes)
    assert found["ball"] == 1 and found["mirror"] > 0.9
    assert teacher.structure(pictures.roll(17, 0), scenes)["ball"] < 1


def test_a_sheet_shows_the_strips_that_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(sheets, "STRIPS", tmp_path / "strips")
    sheets.write_sheet("methods", tmp_path / "sheet.jpg")
    assert not (tmp_path / "sheet.jpg").exists()
    sheets.save_strip(torch.ones(2, 20, 20, 3), tmp_path / "strips" / "lake.jpg")
    sheets.save_strip(
        torch.zeros(2, 20, 20, 3), sheets.strip_path("methods", experiments.METHODS[1].name, "all stages")
    )
    sheets.write_sheet("methods", tmp_path / "sheet.jpg")
    pixels = np.asarray(Image.open(tmp_path / "sheet.jpg").convert("L"))
    width, height = 2 * sheets.HEIGHT, sheets.HEIGHT + sheets.TITLE
    trainings = list(experiments.TRAININGS)
    assert pixels.shape == (2 * height, len(trainings) * (width + 4))
    x = trainings.index("all stages") * (width + 4)
    assert pixels[height + sheets.TITLE + 9 : 2 * height - 9, x + 9 : x + width - 9].max() < 20
    assert pixels[sheets.TITLE + 9 : height - 9, 9 : width - 9].min() > 235


def test_the_pages_say_what_is_stored():
    stored, pages = rows.stored(), {path: path.read_text(encoding="utf-8") for path in tables.PAGES}
    assert stored and tables.pages(stored) == pages, "run: python -m lab.evidence.figures"
    text = "".join(pages.values())
    assert all(0 < float(row["error"]) < 2 for row in stored if row["method"] != "dense")
    for suite in experiments.SUITES:
        assert f"<!-- {suite} -->" in text
    own = experiments.SETTINGS
    told = (f"{own['transfer']['updates']} updates of stage 1, {own['finetune']['block_updates']} block by block and "
            f"{own['finetune']['updates']} end to end")  # fmt: skip
    assert told in " ".join(text.split())


def test_every_figure_is_on_a_page_and_shows_the_stored_rows():
    texts, digest = [page.read_text(encoding="utf-8") for page in tables.PAGES], rows.digest
    linked = {name for text in texts for name in re.findall(r"!\[[^]]+]\((?:\.\./)?figures/([^)]+)\)", text)}
    assert linked == {path.name for path in (EVIDENCE / "figures").iterdir()}
    measured = {row["suite"] for row in rows.stored()} & set(experiments.SUITES)
    suites = {suite.replace(" ", "_") for suite in measured}
    assert suites <= {name.removesuffix(".png") for name in linked}, "a figure per table"
    for path in (EVIDENCE / "figures").glob("*.png"):
        assert Image.open(path).text["Rows"] == digest(path.stem), "run: python -m lab.evidence.figures"
