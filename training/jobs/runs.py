"""A whole job of either stage, from a loaded model to the finished result: the nodes and `worker.py` run the same.

How the updates are done, with a progress bar or by several processes, is the caller's: it hands in `run`.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ...attention.hosts.base import Host, Site
from ...attention.plans import Plan
from ...attention.runtime.backends import refused
from ...attention.specs import SiteSpec
from ...attention.students.candidates import Candidate, Candidates
from ..engine.job_folder import JobFolder
from ..engine.loop import Progress, Say, silent
from ..engine.protocols import Teacher, Trainee
from ..engine.recipe import FinetuneRecipe, TransferRecipe
from ..engine.results import Finished, pack, unmeasured
from ..engine.workers import ALONE, Workers
from ..finetune.finetune import Finetune
from ..samples.folder import TeacherSamples
from ..transfer.transfer import Errors, Transfer, label

S = TypeVar("S", Transfer, Finetune)
Run = Callable[[S], Progress]


def resolved_plans(host: Host, sites: Sequence[Site], plans: Sequence[Plan]) -> list[dict[str, SiteSpec]]:
    """Return the spec of each site, plan by plan, after refusing what the model cannot run.

    Raises:
        ValueError: no plan came in, one is for another host or names a site that is not there, or a spec does not fit.
    """
    if not plans:
        raise ValueError("no plan came in; connect Uniform Plan to say what the sites are to run")
    resolved = []
    for plan in plans:
        if plan.host != host.name:
            raise ValueError(f"the plan is for host {plan.host}, this model is {host.name} ({host.title})")
        specs = plan.resolve([site.id for site in sites])
        for site in sites:
            reason = refused(specs[site.id], site.num_heads, site.head_dim)
            if reason is not None:
                raise ValueError(f"{site.id}: {reason.text}")
        resolved.append(specs)
    return resolved


def run_transfer(
    teacher: Teacher,
    samples: TeacherSamples,
    fingerprint: Tensor,
    specs: Sequence[Mapping[str, SiteSpec]],
    recipe: TransferRecipe,
    job: JobFolder,
    run: Run[Transfer],
    *,
    device: torch.device,
    workers: Workers = ALONE,
    say: Say = silent,
) -> Finished:
    """Return what a job of stage 1 learned, stopped early or not; a job that is done is saved as finished.

    Args:
        teacher: the model and its samples.
        samples: as a folder, for what is told about them.
        fingerprint: of the model.
        specs: of the sites, plan by plan.
        recipe: how.
        job: its folder, opened.
        run: does the updates.
        device: of what learns.
        workers: the processes that train together.
        say: told what is done between updates.
    """
    stage = Transfer(teacher, specs, recipe, device, workers, say)
    before = stage.measure()
    progress = run(stage)
    is_over = progress.is_over(stage.num_updates)  # who cancels does not wait for the matrices
    after = stage.fit_outputs()[1] if recipe.output_draws and is_over else stage.measure()
    notes = [*progress.notes, *stage.notes]
    lines = [*transfer_lines(stage.candidates(before), after), *early_end(progress, stage.num_updates), *notes]
    lines += job.notes  # which name folders of this machine, so they are no part of the recipe
    facts = {
        **recipe.to_json(), "updates_done": progress.done, "samples": len(samples.entries),
        "notes": [*notes, *filter(None, [progress.problem])],
        "error_before": mean_error(before), "error_after": mean_error(after),
    }  # fmt: skip
    candidates = Candidates(
        host=teacher.host.name,
        sites=stage.candidates(after),
        base_model=samples.about.base_model,
        recipe={"transfer": facts},
        fingerprint=fingerprint,
    )
    return _finish(job, progress, stage.num_updates, Finished(candidates, progress.history, "\n".join(lines)))


def run_finetune(
    trainee: Trainee,
    samples: TeacherSamples,
    fingerprint: Tensor,
    student: Candidates,
    recipe: FinetuneRecipe,
    job: JobFolder,
    run: Run[Finetune],
    *,
    device: torch.device,
    workers: Workers = ALONE,
    say: Say = silent,
) -> Finished:
    """Return what a job of stages 2 and 3 learned, as `run_transfer`.

    Args:
        student: one candidate per converted site; it is told its base model where it does not name one.
    """
    known = replace(
        student,
        base_model=student.base_model or samples.about.base_model,
        fingerprint=fingerprint if student.fingerprint is None else student.fingerprint,
    )
    stage = Finetune(trainee, known, recipe, device, workers, say)
    try:
        progress = run(stage)
        found, text = stage.result(progress)
    finally:
        stage.close()
    lines = [text, *job.notes, *progress.notes, *early_end(progress, stage.num_updates)]
    return _finish(job, progress, stage.num_updates, Finished(found, progress.history, "\n".join(lines)))


def _finish(job: JobFolder, progress: Progress, total: int, result: Finished) -> Finished:
    if progress.is_over(total):
        job.finish(*pack(result))
    return result


def transfer_lines(found: Mapping[str, Sequence[Candidate]], after: Errors) -> list[str]:
    """Return each candidate's mean error over the sites that were measured, before and after, and the other sites."""
    rows: dict[str, list[tuple[float, float]]] = {}
    strange: list[str] = []
    for site, candidates in found.items():
        for candidate, error in zip(candidates, after[site], strict=True):
            row, pair = rows.setdefault(label(candidate.spec), []), (candidate.error, error)
            if all(map(math.isfinite, pair)):
                row.append(pair)
            elif site not in strange:
                strange.append(site)
    lines = ["held-out error of the attention outputs, before -> after, mean over sites:"]
    for name, errors in rows.items():
        means = " -> ".join(f"{statistics.fmean(column):.2%}" for column in zip(*errors, strict=True))
        lines.append(f"{name}: {means} ({len(errors)} sites)" if errors else f"{name}: not measured")
    return lines + unmeasured(strange)


def mean_error(errors: Errors) -> float | None:
    """Return the mean over all candidates of all sites that were measured, None where none was."""
    values = [error for of_site in errors.values() for error in of_site if math.isfinite(error)]
    return statistics.fmean(values) if values else None


def early_end(progress: Progress, total: int) -> list[str]:
    """Return what is said of a run that did not make all updates: how far it got and why; nothing of another."""
    if progress.problem:
        return [f"ended after {progress.done} of {total} updates: {progress.problem}"]
    if progress.done < total:
        return [f"cancelled after {progress.done} of {total} updates and saved; run the same workflow again to go on"]
    return []
