"""What Apply and Load do to a model: settings per site from a plan or a student, checked before anything is touched."""

from typing import Any

import torch

from ..attention.fingerprint import distance, fingerprint, match
from ..attention.plans import Plan, describe_sites, select_sites
from ..attention.runtime import SiteSettings
from ..attention.specs import DenseSpec
from ..attention.student_file import StudentFile, check_student, student_maps
from . import patching
from .kind_inputs import untrained_notes


def apply_plan(model: Any, plan: Plan, node_id: str | None) -> Any:
    """Return a clone of `model` that runs a plan with the model's own weights.

    Raises:
        ValueError: the plan is for another host, or names a site that the model lacks.
    """
    host, module = patching.host_of(model)
    if plan.host != host.name:
        raise ValueError(f"the plan is for host {plan.host}, this model is {host.name} ({host.title})")
    sites = [site.id for site in host.sites(module)]
    named = {site for expression, _ in plan.rules for site in select_sites(expression, sites)}
    settings = {
        site: SiteSettings(spec)
        for site, spec in plan.resolve(sites).items()
        if site in named or plan.default != DenseSpec()  # what the plan does not name stays as it was
    }
    notes = untrained_notes(each.spec for each in settings.values())
    earlier = patching.runtime_of(model)
    lost = [site for site in settings if earlier and site in earlier.sites and earlier.sites[site].trained]
    if lost:
        notes.append(f"the distilled weights of {describe_sites(lost)} were taken out")
    status = patching.show_on_node(node_id, notes)
    return patching.patch_model(model, settings, status)[0]


def apply_student(model: Any, student: StudentFile, node_id: str | None) -> Any:
    """Return a clone of `model` that runs a student: its plan, learned parameters and weight deltas.

    Raises:
        ValueError: the student is for another host, or does not fit this model's sites or parameters.
    """
    host, module = patching.host_of(model)
    sites = host.sites(module)
    specs = check_student(student, host.name, sites)
    pools = {name.removesuffix(".pool"): t for name, t in student.parameters.items() if name.endswith(".pool")}
    maps = student_maps(student, specs, sites)
    learned = set(specs) if student.deltas else {*pools, *maps}
    settings = {
        site: SiteSettings(spec, trained=site in learned and not isinstance(spec, DenseSpec), origin=student.origin)
        for site, spec in specs.items()
    }
    notes = (student_note(student), *base_notes(model, student))
    status = patching.show_on_node(node_id, notes)
    return patching.patch_model(model, settings, status, pools=pools, maps=maps, deltas=student.deltas)[0]


def student_note(student: StudentFile) -> str:
    """Return one line about where a student comes from."""
    base = student.base_model or "an unnamed model"
    licence = f", licence {student.licence}" if student.licence else ""
    return f"student of {base}{licence}"


def base_notes(model: Any, student: StudentFile) -> tuple[str, ...]:
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


def model_fingerprint(model: Any) -> torch.Tensor:
    """Return the fingerprint of a model patcher's base weights."""
    host, module = patching.host_of(model)
    return fingerprint([patching.parameter(model, name) for name in host.norm_parameters(module)])
