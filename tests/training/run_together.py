"""A process of a run of several on the toy models; torchrun starts it. Each stage ends with its state in a file."""

import sys
from pathlib import Path

import torch
from toy import Overflowing, ToyTeacher
from toy_trainee import ToyTrainee

from linearize.attention.specs import HybridSpec, LinearSpec
from linearize.attention.students.candidates import Candidate, Candidates
from linearize.attention.students.learned import new_maps
from linearize.training.engine.loop import run_stage
from linearize.training.engine.recipe import FinetuneRecipe, TransferRecipe
from linearize.training.finetune.finetune import Finetune
from linearize.training.jobs.distributed import OtherProcessFailed, SynchronizedStage, join, shared_job
from linearize.training.jobs.watch import StopSignal
from linearize.training.transfer.transfer import Transfer
from linearize.training.worker import leave

CPU, SITES = torch.device("cpu"), ("double.0", "single.0", "single.1")
TRANSFER = TransferRecipe(updates=6, queries=256, held_out=1, warmup=1)
FINETUNE = FinetuneRecipe(block_updates=2, updates=3, rank=2, accumulation=2, warmup=1, held_out=1, ema=0.9)


class Weak(ToyTeacher):
    """Runs out of memory at its third forward."""

    def watch(self, draw, observe):
        if self.forwards == 2:
            self.forwards += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().watch(draw, observe)


def transfer(workers, teacher=None):
    """Return stage 1 on the toy."""
    plans = [dict.fromkeys(SITES, spec) for spec in (LinearSpec("hedgehog"), HybridSpec(3, "polynomial"))]
    return Transfer(teacher or ToyTeacher(), plans, TRANSFER, CPU, workers)


def finetune(workers):
    """Return stages 2 and 3 on the toy."""
    trainee, spec = ToyTrainee(), LinearSpec("hedgehog")
    sites = {}
    for site in trainee.sites:
        maps = zip(("phi_q", "phi_k"), new_maps(spec, site.num_heads, site.head_dim), strict=True)
        learned = {f"{part}.{name}": each.detach() for part, map_ in maps for name, each in map_.named_parameters()}
        sites[site.id] = (Candidate(spec, 1.0, learned),)
    return Finetune(trainee, Candidates("flux", sites), FINETUNE, CPU, workers)


def main(folder, *wanted):
    """Run stages, or all that end well, with the other processes; the first one writes what came out."""
    workers = join(on_cpu=True)
    others = {"memory": Weak(), "overflow": Overflowing("output", 2)} if workers.rank == 1 else {}
    with workers.reporting(), StopSignal() as stop:
        for name in wanted or ("transfer", "finetune", "memory"):
            stage = finetune(workers) if name == "finetune" else transfer(workers, others.get(name))
            with shared_job(folder / name, {"name": name}, workers) as job:
                progress = run_stage(SynchronizedStage(stage, workers, stop), job)
                job.finish(stage.state(), {"notes": progress.notes, "history": progress.history})
    workers.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 0
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except OtherProcessFailed:
        code = 1
    except ValueError as problem:
        sys.stderr.write(f"{problem}\n")
        code = 1
    leave(code)
