"""The page of calibration: means over seeds, agreement of plans, and what is not measured."""

import json

import pytest

from linearize.lab.evidence import calibrated_tables
from linearize.lab.evidence.calibrated import COLUMNS
from linearize.lab.evidence.rows import append


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Rows of two plans with two seeds, and of three calibrations, in a file of their own."""
    path = tmp_path / "calibrated.csv"
    monkeypatch.setattr(calibrated_tables, "CALIBRATED", path)

    def row(method, calibration, seed, error, specs, **more):
        facts = {"date": "2026-12-01", "commit": "abc", "machine": "a card", "torch": "2"}
        return {
            **dict.fromkeys(COLUMNS, ""), **facts, "teacher": "lake", "method": method, "calibration": calibration,
            "seed": seed, "error": error, "specs": json.dumps(specs), "time_share": 0.3, "summed": 0.02, "psnr": 30,
            "ssim": 0.9, **more,
        }  # fmt: skip

    taken = {"checked": 0.001, "calibrating_s": 20, "step_s": 0.5, "planned_step_s": 0.25}
    plan, other = {"single.0": "a", "single.1": "b"}, {"single.0": "a", "single.1": "c"}
    usual = "calibrated, 4 checks"
    append(path, COLUMNS, [
        row("by operations", 0, 0, 0.003, plan), row("by operations", 0, 1, 0.005, plan),
        *(row(usual, 0, seed, 0.002, plan, **taken) for seed in (0, 1)),
        row(usual, 1, 0, 0.004, other, **taken), row(usual, 2, 0, 0.002, plan, **taken),
    ])  # fmt: skip


def test_methods_stand_with_the_means_of_their_seeds_the_worst_first(stored):
    lines = calibrated_tables.method_table("lake").splitlines()[2:]
    assert lines[0] == "| by operations | 30.0 % | 0.020 | 0.00400 | 0.00200 | 30.0 | 0.900 |"
    assert lines[1].startswith("| calibrated, 4 checks | 30.0 % | 0.020 | 0.00200 | 0.00000 |")


def test_calibrations_stand_one_by_one(stored):
    lines = calibrated_tables.calibrations_table().splitlines()[2:]
    assert len(lines) == 3 and lines[1] == "| lake | 1 | 30.0 % | 0.00100 | 0.00400 | 0.25 (0.50) | 20 | 40 |"
    # of three pairs one is equal, and two share one of two sites
    assert calibrated_tables.agreement() == "lake: 67 % of the sites, largest error over least 2.00."


def test_what_was_not_measured_is_called_so(stored):
    assert calibrated_tables.method_table("clips") == "Not measured yet."
