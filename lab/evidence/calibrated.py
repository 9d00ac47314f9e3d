"""Plans by measured errors and seconds, beside others at the same time: `python -m lab.evidence.calibrated`.

Rows go to calibrated.csv; a teacher that has rows is left alone. Each calibration chooses by its own seconds, as that
of a user does. Other plans may take SHARE of dense attention's time by the least seconds of all calibrations, and all
shares are shown by these. Plans are made on a caption of `TUNING_SEED`, and measured on others.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..origin import origin
from .laboratory import Laboratory, unseen
from .measures import picture_scores, relative_error
from .rows import CALIBRATED, append, rows_of
from .untrained import HELD_OUT_SEED, TUNING_SEED, Question, Trial

COLUMNS = (
    "date", "commit", "machine", "torch", "teacher", "captions", "tokens", "method", "calibration", "seed", "specs",
    "time_share", "summed", "checked", "error", "psnr", "ssim", "calibrating_s", "step_s", "planned_step_s",
)  # fmt: skip
SHARE = 0.3
CALIBRATIONS, MORE_CHECKS, STEPS, USUAL_CHECKS = 5, 16, 8, 4
TEACHERS = {"lake": 2, "clips": 2}  # teacher: times the side it was trained at, where kinds are faster than dense here
CAPTIONS, SEEDS = 2, (0, 1, 2)


@dataclass(frozen=True)
class Planned:
    """A plan and how it came about.

    Args:
        method: in words.
        specs: by site; others are dense.
        calibration: whose measures it was made of.
        facts: columns that only a calibration has.
    """

    method: str
    specs: Mapping[str, Any]
    calibration: int
    facts: Mapping[str, Any]


class Calibrations:
    """The calibrations of one teacher, and plans that other rules make of what the first one measured."""

    def __init__(self, laboratory: Laboratory, tokens: int) -> None:
        self.laboratory, self.tokens = laboratory, tokens
        self.choice = laboratory.module("attention.calibration.choice")
        self.knapsack = laboratory.module("attention.planning.knapsack")
        scenes = unseen(laboratory.teacher.draw(40, TUNING_SEED), laboratory.prompts, 1)
        (self.positive,) = laboratory.conditionings(scenes.captions())
        self.usual = [self._measured(seed, USUAL_CHECKS) for seed in range(CALIBRATIONS)]
        self.more = self._measured(0, MORE_CHECKS)
        self.sites = self._least_seconds()

    def plans(self) -> Iterator[Planned]:
        """Yield the plans that are compared."""
        yield from self._singles()
        yield self._planned("one kind, as many sites as needed", self._homogeneous())
        yield self._planned("by operations", self._by_operations())
        target = self.choice.Target("time", SHARE)
        yield self._planned("by summed errors", self.choice.choose_unchecked(self.sites, target, {}).specs)
        yield self._calibrated(f"calibrated, {MORE_CHECKS} checks", self.more, 0)
        for number, found in enumerate(self.usual):
            yield self._calibrated(f"calibrated, {USUAL_CHECKS} checks", found, number)

    def _least_seconds(self) -> Any:
        """Return what the first calibration measured, with the least seconds of all: a machine is never too fast."""
        found = []
        for sites in zip(*(each.calibration.sites for each in [*self.usual, self.more]), strict=True):
            first, seconds = sites[0], {}
            for one in (one for each in sites for one in each.measures):
                seconds[one.spec] = min(one.seconds, seconds.get(one.spec, one.seconds))
            measures = tuple(replace(one, seconds=seconds[one.spec]) for one in first.measures)
            found.append(replace(first, dense_seconds=min(each.dense_seconds for each in sites), measures=measures))
        return tuple(found)

    def share(self, specs: Mapping[str, Any]) -> float:
        """Return the share of dense attention's time that a plan takes, as it was measured."""
        measures = self.laboratory.module("attention.calibration.measures")
        planned, dense = measures.attention_seconds(measures.measured_sites(self.sites, specs, ""))
        return planned / dense

    def summed(self, specs: Mapping[str, Any]) -> float:
        """Return the sum of the sites' errors."""
        return sum(one.error for each in self.sites for one in each.measures if one.spec == specs.get(each.site))

    def _measured(self, seed: int, checks: int) -> Any:
        laboratory = self.laboratory
        calibrate = laboratory.module("patching.calibrate")
        host, module = laboratory.module("patching").host_of(laboratory.model)
        candidates = laboratory.module("attention.calibration.candidates")
        specs = candidates.read_candidates(candidates.USUAL, is_clip=host.makes_clips(module))
        latent = laboratory.teacher.empty(self.tokens, 1)["samples"]
        sampling = calibrate.Sampling(self.positive, steps=STEPS, seed=seed)
        target = self.choice.Target("time", SHARE)
        with torch.inference_mode():
            return calibrate.calibrate(laboratory.model, latent, sampling, specs, target, most_checks=checks)

    def _calibrated(self, method: str, found: Any, number: int) -> Planned:
        calibration, checked = found.calibration, found.choice.checked
        facts: dict[str, Any] = {
            "calibrating_s": round(calibration.spent, 2),
            "step_s": round(calibration.step_seconds, 4),
        }
        if checked is not None:  # else no candidate was faster, on a machine that was busy
            facts |= {"checked": round(checked.error, 6), "planned_step_s": round(checked.seconds, 4)}
        return Planned(method, found.choice.specs, number, facts)

    def _planned(self, method: str, specs: Mapping[str, Any]) -> Planned:
        return Planned(method, specs, 0, {})

    def _singles(self) -> Iterator[Planned]:
        describe = self.laboratory.module("attention.planning.report").describe_spec
        usable = [each for each in self.sites if each.usable]
        for spec in dict.fromkeys(one.spec for each in usable for one in each.usable):
            specs = {each.site: spec for each in usable}
            if self.share(specs) <= SHARE:
                yield self._planned(f"everywhere {describe(spec)}", specs)

    def _homogeneous(self) -> Mapping[str, Any]:
        options = [each.options() for each in self.sites]
        chosen = self.knapsack.plan_under_budget(options, SHARE, "homogeneous")[0].chosen
        return {site: option.spec for site, option in chosen.items()}

    def _by_operations(self) -> Mapping[str, Any]:
        """Return the plan of least summed error under the largest budget of operations that keeps to the time."""
        cost, dense = (
            self.laboratory.module("attention.planning.cost").attention_cost,
            self.laboratory.module("attention.specs").DenseSpec(),
        )
        options = []
        for each in self.sites:
            sizes = (each.layout, each.num_heads, each.head_dim)
            found = tuple(
                self.knapsack.Option(number, one.spec, one.error, cost(one.spec, *sizes).flops)
                for number, one in enumerate(each.usable)
            )
            options.append(self.knapsack.SiteOptions(each.site, cost(dense, *sizes).flops, found))
        for percent in range(100, 0, -1):
            try:
                chosen = self.knapsack.plan_under_budget(options, percent / 100)[0].chosen
            except ValueError:
                break
            specs = {site: option.spec for site, option in chosen.items()}
            if self.share(specs) <= SHARE:
                return specs
        raise ValueError("no budget of operations keeps to the time")


def rows(laboratory: Laboratory, tokens: int, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a teacher; of several calibrations all but the first are measured with one seed."""
    calibrations = Calibrations(laboratory, tokens)
    plans = list(calibrations.plans())
    question = Question(name, (), captions=CAPTIONS, seed=HELD_OUT_SEED, scale=TEACHERS[name])
    plan_of, apply = laboratory.module("attention.plans").Plan.of_sites, laboratory.apply
    to_json = laboratory.module("attention.spec_json").spec_to_json
    for seed in SEEDS:
        trial, measured = Trial(laboratory, question, seed), {}
        for each in plans:
            if seed and each.calibration:
                continue
            specs = json.dumps({site: to_json(spec) for site, spec in each.specs.items()}, sort_keys=True)
            if specs not in measured:  # several rules may find one plan
                measured[specs] = _scores(trial, apply(plan_of(laboratory.teacher.host, each.specs)))
            yield {
                "teacher": name, "captions": CAPTIONS, "tokens": tokens, "method": each.method,
                "calibration": each.calibration, "seed": seed, "specs": specs,
                "time_share": round(calibrations.share(each.specs), 4),
                "summed": round(calibrations.summed(each.specs), 5), **measured[specs], **each.facts,
            }  # fmt: skip


def _scores(trial: Trial, model: Any) -> dict[str, float]:
    """Return the error of a model's velocities and the likeness of its pictures."""
    laboratory = trial.laboratory
    error, _ = relative_error(trial.asked(model), trial.velocities)
    pictures = laboratory.teacher.pictures(laboratory.latents(model, trial.tokens, trial.captions, trial.noise))
    scores = picture_scores(laboratory, pictures, trial.pictures)
    return {"error": round(error, 6), **{key: round(value, 4) for key, value in scores.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure plans by calibration beside others at the same time.")
    parser.add_argument("--teacher", choices=[*TEACHERS], help="default: all")
    wanted = parser.parse_args().teacher
    torch.set_grad_enabled(False)
    done = {row["teacher"] for row in rows_of(CALIBRATED)} | ({*TEACHERS} - {wanted} if wanted else set())
    for name, scale in TEACHERS.items():
        if name in done:
            continue
        laboratory = Laboratory(name, device="cpu")
        began, found = time.monotonic(), []
        for row in rows(laboratory, scale * laboratory.teacher.size, name):
            found.append({**origin("cpu"), **row})
            which = f"{row['method']}, calibration {row['calibration']}, seed {row['seed']}"
            shown = f"time {row['time_share']:.1%}, error {row['error']:.4f}, PSNR {row['psnr']:.1f}"
            print(f"{name}: {which}: {shown}", flush=True)
        append(CALIBRATED, COLUMNS, found)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
