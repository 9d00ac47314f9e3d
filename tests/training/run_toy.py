"""A training run of its own process, to be killed: prints a line per update, saves its state at the end."""

import sys
from pathlib import Path

import torch
from toy import ToyTeacher

from linearize.attention.specs import LinearSpec
from linearize.training.engine.job_folder import JobFolder
from linearize.training.engine.loop import run_stage
from linearize.training.engine.recipe import TransferRecipe
from linearize.training.transfer.transfer import Transfer

RECIPE = TransferRecipe(updates=40, queries=8, held_out=1)


def stage():
    """Return the stage that every run of this test trains."""
    plan = dict.fromkeys(("double.0", "single.0", "single.1"), LinearSpec("hedgehog"))
    return Transfer(ToyTeacher(), [plan], RECIPE, torch.device("cpu"))


def tell(done, total, losses):
    """Write one line per update."""
    sys.stdout.write(f"{done}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = stage()
    with JobFolder(Path(sys.argv[1]), RECIPE.to_json()) as job:
        progress = run_stage(trained, job, tell)
        job.finish(trained.state(), {"done": progress.done})
