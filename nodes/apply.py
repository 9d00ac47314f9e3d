"""Puts the settings of a plan or student on a model, for Apply and Load; checks all before it touches any."""

from typing import Any

from .. import patching
from ..attention.calibration.describe import describe_measured
from ..attention.plans import Plan, select_sites
from ..attention.runtime.runtime import SiteSettings
from ..attention.shown import one_line
from ..attention.specs import DenseSpec
from ..attention.students.candidates import Candidates, decided
from ..attention.students.file import unfinished_stages
from ..attention.students.fingerprint import distance, match
from ..attention.students.fit import check_student, student_parameters
from ..patching.patcher import model_fingerprint
from . import node_status
from .kind_inputs import untrained_notes
from .model_takers import NOT_SAMPLED, taker_notes


def apply_plan(model: Any, plan: Plan, node_id: str | None) -> Any:
    """Return a clone of `model` that runs a plan with the model's own weights.

    Raises:
        ValueError: the plan is for another host, or names a site that the model lacks.
    """
    host, module = patching.host_of(model)
    plan = plan.for_host(host.name, host.title)
    sites = [site.id for site in host.sites(module)]
    try:
        named = {site for expression, _ in plan.rules for site in select_sites(expression, sites)}
    except ValueError as error:
        raise ValueError(f"{error}; the plan was made for another {host.title}, or its sites are mistyped") from None
    settings = {
        site: SiteSettings(spec, measured=plan.measured.get(site))
        for site, spec in plan.resolve(sites).items()
        if site in named or plan.default != DenseSpec()  # what the plan does not name stays as it was
    }
    measured = [each.measured for each in settings.values() if each.measured is not None]
    notes = [
        *untrained_notes(each.spec for each in settings.values()),
        *patching.replaced_notes(model, settings),
        *describe_measured(measured),
    ]
    status = node_status.show_on_node(node_id, notes)
    return patching.patch_model(model, settings, status)[0]


def apply_student(model: Any, student: Candidates, node_id: str | None) -> Any:
    """Return a clone of `model` that runs a student: its plan, learned parameters and weight deltas.

    Of several candidates of a site the one of lowest error runs, and the node says so.

    Raises:
        ValueError: the student is for another host, or does not fit this model's sites or parameters.
    """
    host, module = patching.host_of(model)
    sites = host.sites(module)
    one, note = decided(student)
    file = one.student()
    specs = check_student(file, host.name, sites)
    parameters = student_parameters(file, specs, sites)
    learned = set(specs) if student.deltas else set(parameters.by_site())
    settings = {
        site: SiteSettings(spec, trained=site in learned and not spec.is_dense, origin=file.origin)
        for site, spec in specs.items()
    }
    takers = taker_notes(node_id) if learned else ()
    notes = [student_note(student), note, *base_notes(model, student), *patching.replaced_notes(model, settings)]
    status = node_status.show_on_node(node_id, (*filter(None, notes), *takers))
    if takers:  # the model that they take may never be sampled
        status(NOT_SAMPLED)
    return patching.patch_model(model, settings, status, parameters=parameters, deltas=student.deltas)[0]


def student_note(student: Candidates) -> str:
    """Return one line about where a student comes from."""
    base = one_line(student.base_model or "an unnamed model", 200)
    licence = f", licence {one_line(student.licence, 200)}" if student.licence else ""
    stages = unfinished_stages(student.recipe)
    return f"{'unfinished ' if stages else ''}student of {base}{licence}" + (f" ({stages})" if stages else "")


def base_notes(model: Any, student: Candidates) -> tuple[str, ...]:
    """Return a warning where the student was distilled on another base model; nothing is refused for that."""
    if student.fingerprint is None:
        return ()
    found = model_fingerprint(model)
    kind, apart = match(found, student.fingerprint), distance(found, student.fingerprint)
    if kind == "same":
        return ()
    if kind == "fine-tune":
        return (f"this model is a fine-tune of the student's base (norms {apart:.0%} apart)",)
    return (f"this model is not the student's base (norms {apart:.0%} apart); expect poor pictures",)
