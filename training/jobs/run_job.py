"""A whole training job: its folder, its updates, its result. The nodes and the worker call `run`.

A job is found again by what it is made of: a finished one answers at once, an unfinished one is resumed. What is shown
of a run, and what stops it, is the caller's: see `watch.py`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...attention.hosts.base import Host, Site
from ...attention.planning.report import describe_spec
from ...attention.plans import Plan
from ...attention.runtime.backends import refused
from ...attention.specs import SiteSpec
from ...attention.students.candidates import IN_MEMORY, Candidate, Candidates
from ...attention.students.fit import check_student
from ..engine.job_folder import RESULT, JobFolder, job_key
from ..engine.loop import Losses, Progress, Stage, Stopped, progress_of, run_stage, unfinished
from ..engine.protocols import Model, Teacher, Trainee
from ..engine.recipe import FinetuneRecipe, TransferRecipe
from ..engine.results import Finished, pack, student_digest, unmeasured, unpack
from ..finetune.finetune import Finetune
from ..samples.folder import TeacherSamples
from ..transfer.transfer import ErrorsBySite, Transfer
from .distributed import ProcessGroup, SynchronizedStage, shared_job
from .watch import Pace, Update, Watch

VERSION = 1  # of what training computes; a change of results starts every job anew


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is trained, and how.

    Args:
        root: the folder of all jobs; each has a folder of its own below it.
        recipe: of either method.
        plans: of "transfer": what the sites are to run; several give candidates.
        student: of "finetune": where it begins, with one candidate per site.
        processes: how many train together.
        earlier: folders in which earlier versions may have kept this job, beside those that a model names.
    """

    root: Path
    recipe: TransferRecipe | FinetuneRecipe
    plans: tuple[Plan, ...] = ()
    student: Candidates | None = None
    processes: int = 1
    earlier: tuple[Path, ...] = ()

    def describe(self, host: str, model: str, samples: str) -> dict[str, Any]:
        """Return all that the job's saved state depends on, as JSON holds it.

        Args:
            host: name of the model's host.
            model, samples: their digests.
        """
        description = {
            "kind": self.recipe.method, "version": VERSION, "host": host, "model": model, "samples": samples,
            "recipe": self.recipe.to_json(),
        }  # fmt: skip
        if self.student is None:
            description["plans"] = [plan.to_json() for plan in self.plans]
        else:
            description["student"] = student_digest(self.student)
        return {**description, "gpus": self.processes} if self.processes > 1 else description


def run(job: Job, model: Model, samples: TeacherSamples, watch: Watch, workers: ProcessGroup | None = None) -> Finished:
    """Return what a job learned, stopped early or not; a job that is done is saved as finished.

    Args:
        job: what is trained.
        model: the teacher.
        samples: its own.
        watch: told what happens; may end the updates early.
        workers: the processes that train together; None for this one alone.

    Raises:
        ValueError: the model cannot run the plans, or the student does not fit it. JobProblem: see `JobFolder`.
    """
    workers = workers or ProcessGroup()
    with open_job(job, model, samples, workers) as folder:
        result = finished(folder)
        if result is None:
            work = _Run(job, model, samples, folder, watch, workers)
            if isinstance(job.recipe, TransferRecipe):
                result = model.as_teacher(samples, work.transfer)
            else:
                result = model.as_trainee(samples, work.finetune)
        watch.end(result, folder.path / RESULT)
    return result


@contextmanager
def open_job(job: Job, model: Model, samples: TeacherSamples, workers: ProcessGroup) -> Iterator[JobFolder]:
    """Open a job's folder for all its processes, after refusing what the model cannot run; errors as in `run`."""
    if job.student is None:
        resolved_plans(model.host, model.sites, job.plans)
    else:
        check_student(job.student.student(), model.host.name, model.sites)
    description, *others = (
        job.describe(model.host.name, digest, samples.digest) for digest in (model.digest, *model.earlier_digests)
    )
    earlier = [job.root / job_key(each) for each in others]
    with shared_job(job.root, description, workers, (*earlier, *job.earlier)) as folder:
        yield folder


def finished(folder: JobFolder) -> Finished | None:
    """Return the result of a finished job, or None."""
    saved = folder.result()
    return unpack(*saved) if saved else None


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A job that is not finished, with all it needs."""

    job: Job
    model: Model
    samples: TeacherSamples
    folder: JobFolder
    watch: Watch
    workers: ProcessGroup

    def transfer(self, teacher: Teacher) -> Finished:
        """Run stage 1."""
        recipe = self.job.recipe
        assert isinstance(recipe, TransferRecipe)
        specs = resolved_plans(teacher.host, teacher.sites, self.job.plans)
        stage = Transfer(teacher, specs, recipe, self.model.device, self.workers, self.watch.say)
        before = stage.measure()
        progress = self._do_updates(stage)
        is_over = progress.is_over(stage.num_updates)  # who cancels does not wait for the matrices
        after = stage.fit_outputs()[1] if recipe.output_draws and is_over else stage.measure()
        notes = [*progress.notes, *stage.notes]
        facts = {
            **recipe.to_json(), "updates_done": progress.done, "samples": len(self.samples.entries),
            "notes": [*notes, *filter(None, [progress.problem])],
            "error_before": mean_error(before), "error_after": mean_error(after),
            **unfinished(progress, stage.num_updates),
        }  # fmt: skip
        student = Candidates(
            host=teacher.host.name,
            sites=stage.candidates(after),
            base_model=self.samples.about.base_model,
            recipe={"transfer": facts},
            fingerprint=self.model.fingerprint,
        )
        lines = transfer_lines(stage.candidates(before), after)
        return self._finish(student, progress, stage, [*lines, *early_end(progress, stage.num_updates), *notes])

    def finetune(self, trainee: Trainee) -> Finished:
        """Run stages 2 and 3. A student that names no base model or fingerprint gets those of the model."""
        recipe, student = self.job.recipe, self.job.student
        assert isinstance(recipe, FinetuneRecipe) and student is not None
        known = replace(
            student,
            base_model=student.base_model or self.samples.about.base_model,
            fingerprint=self.model.fingerprint if student.fingerprint is None else student.fingerprint,
            origin=IN_MEMORY,
        )
        stage = Finetune(trainee, known, recipe, self.model.device, self.workers, self.watch.say)
        try:
            progress = self._do_updates(stage)
            found, text = stage.result(progress)
        finally:
            stage.close()
        return self._finish(found, progress, stage, [text, *early_end(progress, stage.num_updates), *progress.notes])

    def _do_updates(self, stage: Stage) -> Progress:
        """Do the updates that are left; return how far they got."""
        watch, is_cancelled = self.watch, False
        watch.begin(stage)
        with watch.stop as stop:
            synchronized, pace = SynchronizedStage(stage, self.workers, stop), Pace()

            def report(done: int, total: int, losses: Losses) -> None:
                watch.update(Update(done, total, losses, pace.seconds(done)))
                if synchronized.stopping and done < total:
                    raise Stopped

            try:
                progress = run_stage(synchronized, self.folder, report, watch.resumed)
            except watch.interrupts:
                progress, is_cancelled = progress_of(self.folder), True
        is_cancelled |= stop.is_set or synchronized.stopping  # what comes after the updates takes its time too
        if is_cancelled or not progress.is_over(stage.num_updates):
            watch.stopped(progress, stage.num_updates)
        return progress

    def _finish(self, student: Candidates, progress: Progress, stage: Stage, lines: Sequence[str]) -> Finished:
        # notes on files name folders of this machine, so they are no part of the student's recipe
        result = Finished(student, progress.history, "\n".join([*lines, *self.folder.notes]))
        if progress.is_over(stage.num_updates):
            self.folder.finish(*pack(result))
        return result


def resolved_plans(host: Host, sites: Sequence[Site], plans: Sequence[Plan]) -> list[dict[str, SiteSpec]]:
    """Return the spec of each site, plan by plan, after refusing what the model cannot run.

    Raises:
        ValueError: no plan came in, one is for another host or names a site that is not there, or a spec does not fit.
    """
    if not plans:
        raise ValueError("no plan came in; connect Uniform Plan to say what the sites are to run")
    resolved = []
    for plan in plans:
        plan = plan.for_host(host.name, host.title)
        specs = plan.resolve([site.id for site in sites])
        for site in sites:
            reason = refused(specs[site.id], site.num_heads, site.head_dim)
            if reason is not None:
                raise ValueError(f"{site.id}: {reason.text}")
        resolved.append(specs)
    return resolved


def transfer_lines(found: Mapping[str, Sequence[Candidate]], after: ErrorsBySite) -> list[str]:
    """Return each candidate's mean error over the sites that were measured, before and after, and the other sites."""
    rows: dict[str, list[tuple[float, float]]] = {}
    strange: list[str] = []
    for site, candidates in found.items():
        for candidate, error in zip(candidates, after[site], strict=True):
            row, pair = rows.setdefault(describe_spec(candidate.spec), []), (candidate.error, error)
            if all(map(math.isfinite, pair)):
                row.append(pair)
            elif site not in strange:
                strange.append(site)
    lines = ["held-out error of the attention outputs, before -> after, mean over sites:"]
    for name, errors in rows.items():
        means = " -> ".join(f"{statistics.fmean(column):.2%}" for column in zip(*errors, strict=True))
        lines.append(f"{name}: {means} ({len(errors)} sites)" if errors else f"{name}: not measured")
    return lines + unmeasured(strange)


def mean_error(errors: ErrorsBySite) -> float | None:
    """Return the mean over all candidates of all sites that were measured, None where none was."""
    values = [error for of_site in errors.values() for error in of_site if math.isfinite(error)]
    return statistics.fmean(values) if values else None


def early_end(progress: Progress, total: int) -> list[str]:
    """Return a line for an incomplete run, how far it got and why; none for a complete one."""
    if progress.problem:
        return [f"ended after {progress.done} of {total} updates: {progress.problem}"]
    if progress.done < total:
        return [f"UNFINISHED · cancelled after {progress.done} of {total} updates, run again to go on"]
    return []
