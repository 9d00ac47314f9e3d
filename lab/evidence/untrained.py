"""Attention that needs no training, measured at equal keys: `python -m lab.evidence.untrained`.

Rows go to untrained.csv; what is there stays, and a run does what is missing. A row is one method on one question with
one seed of noise. Settings were tuned on captions of `TUNING_SEED`, the tables show others, of `HELD_OUT_SEED`.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..origin import origin
from .laboratory import TEST_SEED, Laboratory, unseen
from .measures import LEVELS, picture_scores, relative_error, velocities
from .rivals import TALLY, add_rivals
from .rows import UNTRAINED, append, rows_of
from .untrained_methods import CLIPS, LARGE_CLIPS, LARGE_PICTURES, PICTURES, TUNED_CLIPS, TUNED_PICTURES, Method

COLUMNS = (
    "date", "commit", "machine", "torch", "question", "captions", "tokens", "method", "spec", "seed", "keys", "error",
    "errors_by_level", "psnr", "ssim", "structure",
)  # fmt: skip
TUNING_SEED, HELD_OUT_SEED = TEST_SEED, 70_000  # of captions
SEEDS = (0, 1, 2)  # of noise
TEXT_TOKENS = 12


@dataclass(frozen=True)
class Question:
    """What is measured on what.

    Args:
        teacher: its name.
        scale: of the teacher's side in tokens.
        sampled: measure pictures that are sampled, besides velocities.
        captions: number of them. seed: that they are drawn with.
        seeds: of noise.
        methods: that are compared.
    """

    teacher: str
    methods: tuple[Method, ...]
    captions: int = 4
    seed: int = HELD_OUT_SEED
    seeds: tuple[int, ...] = SEEDS
    scale: int = 1
    sampled: bool = True


QUESTIONS = {
    "tuning, pictures": Question("lake", TUNED_PICTURES, seed=TUNING_SEED, seeds=(0,), sampled=False),
    "tuning, clips": Question("clips", TUNED_CLIPS, seed=TUNING_SEED, seeds=(0,), sampled=False),
    "pictures": Question("lake", PICTURES),
    "clips": Question("clips", CLIPS),
    "large pictures": Question("lake", LARGE_PICTURES, captions=2, scale=2, sampled=False),
    "large clips": Question("clips", LARGE_CLIPS, captions=2, scale=2, sampled=False),
}


class Trial:
    """The teacher's own answers to a question with one seed of noise, that methods are measured against."""

    def __init__(self, laboratory: Laboratory, question: Question, seed: int) -> None:
        self.laboratory, self.question = laboratory, question
        teacher = laboratory.teacher
        drawn = teacher.draw(40 * question.captions, question.seed)
        seen = laboratory.prompts + (laboratory.test.captions() if question.seed == HELD_OUT_SEED else [])
        self.scenes = unseen(drawn, seen, question.captions)
        self.captions = self.scenes.captions()
        self.tokens, self.noise = question.scale * teacher.size, 10_000 * (1 + seed)
        self.clean = laboratory.latents(laboratory.model, self.tokens, self.captions, self.noise)
        self.velocities = self.asked(laboratory.model)

    @cached_property
    def pictures(self) -> Any:
        """The teacher's pictures."""
        return self.laboratory.teacher.pictures(self.clean)

    def asked(self, model: Any) -> Any:
        """Return the velocities of a model."""
        return velocities(self.laboratory, model, self.clean, self.captions, self.noise)

    def row(self, spec: Any) -> dict[str, Any]:
        """Return what is measured of a spec at every site; None is the teacher itself."""
        laboratory, model = self.laboratory, self.laboratory.model
        if spec is not None:
            plan = laboratory.module("attention.plans").Plan(laboratory.teacher.host, spec)
            model = laboratory.apply(plan)
        TALLY.clear()
        error, levels = relative_error(self.asked(model), self.velocities)
        shares = {str(level): round(each, 6) for level, each in zip(LEVELS, levels, strict=True)}
        found: dict[str, Any] = {"error": round(error, 6), "errors_by_level": json.dumps(shares)}
        found["keys"] = round(sum(TALLY) / len(TALLY) if TALLY else self.keys(spec), 4)
        if self.question.sampled:
            teacher = laboratory.teacher
            pictures = teacher.pictures(laboratory.latents(model, self.tokens, self.captions, self.noise))
            scores = picture_scores(laboratory, pictures, self.pictures)
            found |= {name: round(value, 4) for name, value in scores.items()}
            structure = teacher.structure(pictures, self.scenes)
            found["structure"] = json.dumps({name: round(value, 4) for name, value in structure.items()})
        return found

    def keys(self, spec: Any) -> float:
        """Return the share of the image keys, exact ones and means, that an image query sees under a spec."""
        if spec is None:
            return 1.0
        laboratory = self.laboratory
        host, module = laboratory.module("patching").host_of(laboratory.model)
        width, height, frames = laboratory.teacher.dimensions(self.tokens)
        layout = host.planned_layout(module, width, height, frames, TEXT_TOKENS)
        cost = laboratory.module("attention.planning.cost").attention_cost(spec, layout, 1, 1)
        own = layout.num_tokens - layout.num_global
        return (cost.pairs - layout.num_global * (layout.num_tokens + own)) / own**2


def measure(names: list[str]) -> None:
    """Store the rows of some questions that are missing, question by question and seed by seed."""
    laboratories: dict[str, Laboratory] = {}
    for name in names:
        question = QUESTIONS[name]
        every = [(method, seed) for seed in question.seeds for method in (Method("dense", {}), *question.methods)]
        done = {(row["question"], row["method"], row["seed"]) for row in rows_of(UNTRAINED)}
        missing = [(method, seed) for method, seed in every if (name, method.name, str(seed)) not in done]
        print(f"{name}: {len(every)} rows, {len(missing)} to do", flush=True)
        if missing and question.teacher not in laboratories:
            laboratories[question.teacher] = Laboratory(question.teacher, device="cpu")
            add_rivals(laboratories[question.teacher])
        trials: dict[int, Trial] = {}
        for method, seed in missing:
            laboratory = laboratories[question.teacher]
            trial = trials.setdefault(seed, trials.get(seed) or Trial(laboratory, question, seed))
            spec = laboratory.module("attention.spec_json").spec_from_json(method.spec) if method.spec else None
            row = {"question": name, "captions": question.captions, "tokens": trial.tokens, "method": method.name,
                   "spec": json.dumps(method.spec), "seed": seed, **trial.row(spec)}  # fmt: skip
            append(UNTRAINED, COLUMNS, [{**origin("cpu"), **row}])
            shown = f", PSNR {row['psnr']:.1f}" if "psnr" in row else ""
            print(f"  {method.name}, seed {seed}: keys {row['keys']:.1%}, error {row['error']:.4f}{shown}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure attention that needs no training, at equal keys.")
    parser.add_argument("--question", default="", help=f"one of: {'; '.join(QUESTIONS)}; default: all")
    wanted = parser.parse_args().question
    if wanted not in ("", *QUESTIONS):
        print(f"{wanted!r} is no question; there are: {'; '.join(QUESTIONS)}", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    measure([name for name in QUESTIONS if wanted in ("", name)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
