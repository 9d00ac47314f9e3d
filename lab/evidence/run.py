"""Distil students and measure them: `python -m lab.evidence.run`. Rows go to results.csv; what is there stays.

It may be stopped at any time: rows are stored one by one, and the next run does what is missing. `--scale` multiplies
the updates; its rows say so in the column `scale`. Rows are known by name: after a change of settings in
`experiments.py` or of a preset, those that it concerns have to be taken out by hand.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..origin import origin
from .classifier import trained
from .experiments import SUITES, TEACHER, TRAININGS, UNTRAINED, Experiment, Method, num_updates
from .laboratory import HOME, TEACHERS, Laboratory
from .measures import (
    LEVELS,
    VELOCITY_PICTURES,
    frechet_distance,
    picture_scores,
    relative_error,
    velocities,
)
from .rows import RESULTS, append, stored
from .sheets import SHOWN, STRIPS, save_strip, strip_path

COLUMNS = (
    "date", "commit", "machine", "torch", "scale", "suite", "method", "training", "seed", "note", "tokens", "error",
    "errors_by_level", "psnr", "ssim", "frechet", "structure", "flops", "sampling_s", "updates", "outcome",
)  # fmt: skip
REFERENCE, REFERENCE_SEED = 256, 40_000  # drawn scenes that Frechet distances are measured from


class Judge:
    """Measures students at one number of tokens a side against the teacher.

    Args:
        laboratory: where the teacher is.
        tokens: a side.
    """

    def __init__(self, laboratory: Laboratory, tokens: int) -> None:
        self.laboratory, self.tokens = laboratory, tokens
        start = time.monotonic()
        self.clean = laboratory.latents(laboratory.model, tokens)
        self.seconds = time.monotonic() - start
        self.pictures = laboratory.teacher.pictures(self.clean)
        self.velocities = velocities(laboratory, laboratory.model, self.clean[:VELOCITY_PICTURES])
        self.classifier = trained(laboratory.teacher, HOME)
        with torch.inference_mode():
            drawn = laboratory.teacher.drawn_views(laboratory.teacher.draw(REFERENCE, REFERENCE_SEED))
            self.reference = self.classifier.features(drawn)

    def row(self, attention: Any, strip: Path | None = None) -> dict[str, Any]:
        """Return what is measured, by column of results.csv: all but what `measure` adds.

        Args:
            attention: a plan or a student; None is the teacher itself.
            strip: where some of the pictures are kept.
        """
        laboratory, model = self.laboratory, self.laboratory.model
        pictures, predicted, seconds = self.pictures, self.velocities, self.seconds
        if attention is not None:
            model = laboratory.apply(attention)
            start = time.monotonic()
            pictures = laboratory.teacher.pictures(laboratory.latents(model, self.tokens))
            seconds = time.monotonic() - start
            predicted = velocities(laboratory, model, self.clean[:VELOCITY_PICTURES])
        if strip is not None:
            save_strip(laboratory.teacher.shown(pictures), strip)
        error, by_level = relative_error(predicted, self.velocities)
        levels = {str(level): round(each, 6) for level, each in zip(LEVELS, by_level, strict=True)}
        with torch.inference_mode():
            features = self.classifier.features(laboratory.teacher.views(pictures))
        return {
            "error": round(error, 6), "errors_by_level": json.dumps(levels),
            **rounded(picture_scores(laboratory, pictures, self.pictures)),
            "structure": json.dumps(rounded(laboratory.teacher.structure(pictures, laboratory.test))),
            "frechet": round(frechet_distance(features, self.reference), 3), "sampling_s": round(seconds, 1),
        }  # fmt: skip


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Return numbers with four digits behind the point."""
    return {name: round(value, 4) for name, value in values.items()}


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """Return what makes a stored row comparable, as `Experiment.key`, and its scale."""
    return (*(row[name] for name in ("suite", "method", "training", "seed", "note", "tokens")), row["scale"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil students of a teacher and measure them.")
    parser.add_argument("--teacher", default="lake", choices=TEACHERS, help="the image or the video teacher")
    parser.add_argument("--suite", default="", help=f"one of {', '.join(SUITES)}; default: all of the teacher")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the updates")
    parser.add_argument("--minutes", type=float, default=0.0, help="start nothing new after this; 0: no limit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    suites = [name for name in SUITES if TEACHER[name] == args.teacher and args.suite in ("", name)]
    if not suites:
        parser.error(f"{args.suite!r} is no suite of {args.teacher}; it has "
                     f"{', '.join(name for name in SUITES if TEACHER[name] == args.teacher)}")  # fmt: skip
    experiments = [each for name in suites for each in SUITES[name]()]
    done = {key_of(row) for row in stored()}
    missing = [each for each in experiments if (*each.key, str(args.scale)) not in done]
    print(f"{len(experiments)} experiments, {len(missing)} to do", flush=True)
    if missing:
        laboratory = Laboratory(args.teacher, device=args.device, scale=args.scale)
        limit = 60 * args.minutes or float("inf")
        failed = measure(laboratory, sorted(missing, key=lambda each: each.seed), limit)
        for each in failed:
            print(each, file=sys.stderr)
        return int(bool(failed))
    return 0


def measure(laboratory: Laboratory, experiments: list[Experiment], seconds: float) -> list[str]:
    """Do experiments and store a row of each; start none after some seconds.

    Args:
        laboratory: where the teacher is.
        experiments: in order.
        seconds: from now.

    Returns:
        What failed, and why.
    """
    judges, failed, start = {}, [], time.monotonic()
    for number, experiment in enumerate(experiments, start=1):
        if time.monotonic() - start > seconds:
            print("the time is up; run again for the rest")
            break
        if experiment.tokens not in judges:
            judge = judges[experiment.tokens] = Judge(laboratory, experiment.tokens)
            store_dense(judge)
        try:
            attention = laboratory.student(experiment)
        except ValueError as problem:  # the others can still be done
            failed.append(f"{' '.join(experiment.key)}: {problem}")
            continue
        row = judges[experiment.tokens].row(attention, strip_of(experiment, laboratory.scale))
        row["flops"] = round(laboratory.flops_kept(attention, experiment.tokens), 4)
        row["updates"] = num_updates(experiment, laboratory.scale)
        whole = {**origin(laboratory.device), **described(experiment, laboratory.scale), **row}
        append(RESULTS, COLUMNS, [{**whole, "outcome": outcome(attention, experiment)}])
        print(f"{number}/{len(experiments)} {' '.join(experiment.key)}: error {row['error']:.4f}, "
              f"PSNR {row['psnr']:.2f}", flush=True)  # fmt: skip
    return failed


def outcome(attention: Any, experiment: Experiment) -> str:
    """Return what became of the training: "" as it should be, or why the student is less than the recipe says."""
    if not any(TRAININGS[experiment.training][2:]):
        return ""
    facts = attention.recipe.get("finetune")
    if facts is None:
        return "given back"  # fine-tuning made it worse
    return "; ".join(facts["notes"])


def store_dense(judge: Judge) -> None:
    """Store the teacher's own row, once per size, and its pictures."""
    teacher, scale = judge.laboratory.teacher, judge.laboratory.scale
    name, tokens = f"dense {teacher.name}", judge.tokens
    if tokens == teacher.size:
        save_strip(teacher.shown(judge.pictures), STRIPS / f"{teacher.name}.jpg")
    if not any((row["suite"], row["tokens"], row["scale"]) == (name, str(tokens), str(scale)) for row in stored()):
        base = Experiment(name, Method("dense", ()), UNTRAINED, tokens=tokens)
        row = {
            **origin(judge.laboratory.device),
            **described(base, scale),
            **judge.row(None),
            "flops": 1.0,
            "updates": 0,
        }
        append(RESULTS, COLUMNS, [row])


def strip_of(experiment: Experiment, scale: float) -> Path | None:
    """Return where pictures of an experiment are kept for the sheets, or None where they are not shown."""
    if experiment.suite not in SHOWN or experiment.seed or scale != 1.0:
        return None
    return strip_path(experiment.suite, experiment.method.name, experiment.training)


def described(experiment: Experiment, scale: float) -> dict[str, Any]:
    """Return what results.csv says of an experiment before it is measured."""
    names = ("suite", "method", "training", "seed", "note", "tokens")
    return {**dict(zip(names, experiment.key, strict=True)), "scale": scale}


if __name__ == "__main__":
    raise SystemExit(main())
