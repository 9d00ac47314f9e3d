"""The evidence: distances against closed forms, verdicts on rows made up for them, a page that tells what is stored."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

OWN = {
    "degrees",
    "claims",
    "experiments",
    "measures",
    "classifier",
    "tables",
    "rows",
    "sheets",
    "clips",
    "scenes",
    "scores",
    "clip_latents",
}
EVIDENCE = Path(__file__).resolve().parents[2] / "evidence"


@pytest.fixture(scope="module")
def modules():
    """A function that imports a script of evidence/."""
    path, others = list(sys.path), {name: sys.modules.pop(name) for name in OWN & set(sys.modules)}
    sys.path.insert(0, str(EVIDENCE))
    yield importlib.import_module
    sys.path[:] = path
    for name in OWN & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


def row(suite, method, training, note, seed, error):
    names = ("suite", "method", "training", "note", "seed", "error")
    values = dict(zip(names, (suite, method, training, note, str(seed), str(error)), strict=True))
    return {**values, "tokens": "32", "scale": "1.0", "outcome": ""}


def test_frechet_distance_of_gaussians(modules):
    """Two sets that differ by a shift and a scale: |shift|^2 + sum (s1 - s2)^2, with the ridge in both variances."""
    measures = modules("measures")
    generator = torch.Generator().manual_seed(0)
    unit = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    unit = unit - unit.mean(0)
    unit = unit @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(unit.T))).T  # covariance exactly 1
    first, second = 3 * unit, unit + 2.0
    assert measures.frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    ridge = 0.2 * torch.cat((first, second)).var(0).mean()
    expected = 5 * 4.0 + 5 * ((9 + ridge).sqrt() - (1 + ridge).sqrt()) ** 2
    assert measures.frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_errors_are_energies_by_level(modules):
    teacher = torch.ones(2, 3, 4, 5)
    teacher[:, 2] *= 2
    student = teacher.clone()
    student[:, 1] += 0.5
    error, levels = modules("measures").relative_error(student, teacher)
    assert levels == pytest.approx([0, 0.25, 0]) and error == pytest.approx(0.25 / (1 + 1 + 4))


def test_verdicts(modules):
    claims = modules("claims")
    windows = claims.Claim("x", "y", (claims.Group("s", "a"), claims.Group("s", "b")))
    rows = [row("s", "a", "all stages", "", seed, 0.4) for seed in range(3)]
    assert windows.verdict(rows) == "not measured"
    rows += [row("s", "b", "all stages", "", seed, error) for seed, error in enumerate((0.1, 0.2, 0.5))]
    assert windows.verdict(rows) == "mixed: 0.4000 > 0.2667, 2 of 3 seeds"
    twice = claims.Claim("x", "y", windows.groups, 2.0)
    assert twice.verdict(rows).startswith("not reproduced")
    tolerant = claims.Claim("x", "y", windows.groups[::-1], 1 / 1.6)
    assert tolerant.verdict(rows) == "mixed: 0.2667 vs 0.4000, 1 of 3 seeds"
    assert claims.Claim("x", "y", windows.groups[::-1], 1 / 1.4).verdict(rows).startswith("not reproduced")
    rows.append(row("s", "b", "all stages", "", 2, 0.05))
    assert windows.verdict(rows) == "reproduced: 0.4000 > 0.1167, 3 of 3 seeds", "the newest row of a seed counts"
    rows[-1]["outcome"] = "given back"
    assert windows.verdict(rows).endswith("in 1 of these runs fine-tuning stopped early or made it worse")
    rows[-1]["scale"] = "10.0"
    assert "2 of 3 seeds" in windows.verdict(rows), "rows of another scale do not count"
    start = claims.Claim("x", "y", (claims.Group("s", "a", "untrained"), claims.Group("s", "b")))
    assert start.verdict([*rows, row("s", "a", "untrained", "", 0, 0.3)]).startswith("mixed: 0.3000 > 0.2667, 2 of 3")
    assert windows.verdict([row("s", "a", "all stages", "", 0, 1), row("s", "b", "all stages", "", 1, 1)]) == (
        "not measured with a common seed"
    )


def test_every_claim_asks_for_experiments_that_are_run(modules):
    claims, experiments = modules("claims"), modules("experiments")
    every = [each for suite in experiments.SUITES.values() for each in suite()]
    keys = [each.key for each in every]
    assert len(set(keys)) == len(keys) > 100
    known = {(each.suite, each.method.name, each.training, each.note, each.tokens) for each in every}
    groups = [group for claim in claims.CLAIMS for group in claim.groups]
    assert len(groups) > 40 and set(experiments.TEACHER) == set(experiments.SUITES)
    for group in groups:
        assert (group.suite, group.method, group.training, group.note, group.tokens) in known, group


def test_recipes_take_equal_updates(modules):
    experiments = modules("experiments")
    for part in (1.0, *experiments.PARTS):
        for method in (experiments.clear(4), experiments.hybrid(4)):
            tried = [experiments.recipe("x", method, name, 0, part) for name in experiments.RECIPES]
            if not method.has_maps:
                tried = [each for each in tried if each.note != "attention surgery"]  # which trains maps
            counts = {each.note: experiments.num_updates(each) for each in tried}
            assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_rates_and_noise_levels_change_nothing_else(modules):
    """What a suite compares is all that its experiments differ in, but for the seed."""
    experiments = modules("experiments")
    by_recipe: dict[tuple[str, str], list] = {}
    for each in experiments.rates():
        by_recipe.setdefault((each.method.name, each.note.partition(",")[0]), []).append(each)
    assert len(by_recipe) == 4
    for group in by_recipe.values():
        rates = [(each.finetune["map_rate"], each.finetune["delta_rate"]) for each in group]
        assert rates == [(rate, rate) for rate in experiments.RATES]
        plain = [replace(each, note="", finetune={**each.finetune, "map_rate": 0, "delta_rate": 0}) for each in group]
        assert plain[1:] == plain[:-1]
    draws = [each for each in experiments.noise_levels() if each.seed == 0]
    assert [each.finetune["preset"] for each in draws] == list(experiments.DRAWS)
    plain = [replace(each, note="", finetune={**each.finetune, "preset": ""}) for each in draws]
    assert len(plain) == 3 and plain[1:] == plain[:-1]


def test_maps_of_other_degrees(modules, monkeypatch):
    """Degree 2 is the pack's own map; part n of another is its part of degree 1 raised to the power n."""
    from linearize.attention import feature_maps, specs

    monkeypatch.setattr(feature_maps, "MAPS", dict(feature_maps.MAPS))
    monkeypatch.setattr(specs, "FEATURE_MAPS", specs.FEATURE_MAPS)
    degrees = modules("degrees")
    degrees.add_degrees(feature_maps, specs)
    x, own = torch.randn(2, 3, 7, 16), feature_maps.Polynomial(3, 16)
    own.reset(torch.Generator().manual_seed(1))
    found = {}
    for degree in degrees.DEGREES:
        name = degrees.name_of(degree)
        assert specs.spec_from_json({"kind": "hybrid", "rate": 4, "feature_map": name}).feature_map == name
        each = feature_maps.MAPS[name](3, 16)
        each.load_state_dict(own.state_dict())
        found[degree] = each(x)
    assert torch.equal(found[2], own(x))
    first = found[1].chunk(4, -1)
    torch.testing.assert_close(found[4], torch.cat([part**n for n, part in enumerate(first, 1)], -1))
    assert not torch.allclose(found[1], found[2])


def test_the_table_of_costs(modules, monkeypatch):
    tables = modules("tables")
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
def test_budgets_can_be_reached_and_the_planners_differ(modules, suite):
    """With errors that fall as costs rise, and sites that differ in how much they need."""
    from linearize.attention import Segment, TokenLayout, attention_cost, grid_segment
    from linearize.attention.specs import DenseSpec, spec_from_json
    from linearize.training.budget import Option, SiteOptions, plan_under_budget

    grids = {"budgets": (Segment("text", 12), grid_segment("main", 1, 32, 32)),
             "video budgets": (grid_segment("main", 5, 12, 16),)}  # fmt: skip
    layout = TokenLayout.of(grids[suite])
    dense = attention_cost(DenseSpec(), layout, 2, 128).flops
    for each in modules("experiments").SUITES[suite]():
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


def test_specs_of_methods_are_specs(modules):
    from linearize.attention.specs import spec_from_json

    experiments = modules("experiments")
    for method in experiments.METHODS + experiments.VIDEO_METHODS:
        learned = [getattr(spec_from_json(spec), "feature_map", "") in experiments.LEARNED for spec in method.specs]
        pooled = [getattr(spec_from_json(spec), "down_factor", 1) > 1 for spec in method.specs]
        assert method.has_maps == any(learned + pooled), "stage 1 runs exactly where there is something to learn"
        assert [spec_from_json(spec).kind for spec in method.specs]


def test_the_video_teacher_reads_its_own_frames(modules, monkeypatch):
    """Drawn scenes, through the latents as ComfyUI hands them around, are judged as right; wrong captions are not."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    teacher = modules("clips").Clips(None)
    scenes = teacher.draw(6, 3)
    empty = teacher.empty(teacher.size, 6)["samples"]
    latents = teacher.drawn_latents(scenes.captions(), 4)
    assert latents.shape == empty.shape and teacher.dimensions(teacher.size) == (256, 192, 17)
    pictures = teacher.pictures(modules("clip_latents").to_comfyui(latents))
    assert pictures.shape == (6 * 17, 48, 64, 3) and teacher.shown(pictures).shape == (4, 48, 64, 3)
    assert teacher.views(pictures).shape == teacher.drawn_views(scenes).shape == (6, teacher.channels, 48, 64)
    unseen = modules("laboratory").unseen(teacher.draw(60, 5), scenes.captions(), 4)
    assert len(unseen.captions()) == 4 and not set(unseen.captions()) & set(scenes.captions())
    with pytest.raises(ValueError, match="only 0 of the scenes"):
        modules("laboratory").unseen(scenes, scenes.captions(), 1)
    found = teacher.structure(pictures, scenes)
    assert found["ball"] == 1 and found["mirror"] > 0.9
    assert teacher.structure(pictures.roll(17, 0), scenes)["ball"] < 1


def test_a_sheet_shows_the_strips_that_there_are(modules, monkeypatch, tmp_path):
    sheets, experiments = modules("sheets"), modules("experiments")
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
    trainings = list(dict.fromkeys(each.training for each in experiments.SUITES["methods"]()))
    assert pixels.shape == (2 * height, len(trainings) * (width + 4))
    x = trainings.index("all stages") * (width + 4)
    assert pixels[height + sheets.TITLE + 9 : 2 * height - 9, x + 9 : x + width - 9].max() < 20
    assert pixels[sheets.TITLE + 9 : height - 9, 9 : width - 9].min() > 235


def test_the_page_tells_what_is_stored(modules):
    tables = modules("tables")
    rows = modules("rows").stored()
    assert rows and tables.page(rows) == tables.PAGE.read_text(encoding="utf-8"), "run evidence/figures.py"
    assert all(0 < float(row["error"]) < 2 for row in rows if row["method"] != "dense")
    pictures = re.findall(r"!\[[^]]+]\(([^)]+)\)", tables.PAGE.read_text(encoding="utf-8"))
    assert len(pictures) >= 2 and all((EVIDENCE / picture).is_file() for picture in pictures)
