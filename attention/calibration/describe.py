"""A calibration in words, its outcome first."""

import time
from collections.abc import Sequence

from ..planning.report import describe_specs
from ..plans import SiteMeasured, describe_sites
from ..specs import DenseSpec, SiteSpec
from ..words import counted, percent, seconds_as_text
from .choice import Choice, Target
from .file import Calibration
from .measures import attention_seconds, measured_sites


def when_and_where(at: float, device: str) -> str:
    """Return when and on what something was measured, as "2026-12-01 13:40 on cpu"."""
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(at))} on {device}"


def outcome(calibration: Calibration, choice: Choice, target: Target) -> str:
    """Return in one line what came out: seconds a step, the share of attention's time, the error."""
    planned, dense = attention_seconds(measured_sites(calibration.sites, choice.specs, ""))
    dense_step = seconds_as_text(calibration.step_seconds)
    if not choice.specs:
        return f"DENSE · {_why_dense(calibration, choice, target)} · {dense_step} s a step"
    checked = choice.checked
    seconds = checked.seconds if checked else max(calibration.step_seconds - dense + planned, planned)
    about, error = ("", checked.error) if checked else ("about ", choice.predicted)
    return " · ".join([
        "CALIBRATED",
        f"{about}{seconds_as_text(seconds)} s a step, dense {about}{dense_step}",
        f"{percent(planned / dense)} of attention's time",
        f"error {about}{error:.2g}",
    ])  # fmt: skip


def _why_dense(calibration: Calibration, choice: Choice, target: Target) -> str:
    if not any(each.usable for each in calibration.sites):
        return "no candidate is faster here"
    if target.goal == "error":
        return f"no plan stays within error {target.value:g}"
    return "dense attention is within that share of its time" if choice.is_within else "no plan gains a step"


def details(calibration: Calibration, choice: Choice) -> list[str]:
    """Return lines about what each site runs, what could not be measured, and when the time spent is won back."""
    specs: dict[str, SiteSpec] = {each.site: choice.specs.get(each.site, DenseSpec()) for each in calibration.sites}
    lines = describe_specs(specs)
    if not choice.is_within:
        lines.append("that share of attention's time cannot be reached with these candidates; this is the least")
    reasons: dict[str, list[str]] = {}
    for each in calibration.sites:
        if each.reason:
            reasons.setdefault(each.reason, []).append(each.site)
    lines += [f"not measured, {describe_sites(sites)}: {reason}" for reason, sites in reasons.items()]
    return [*lines, *_break_even(calibration, choice)]


def _break_even(calibration: Calibration, choice: Choice) -> list[str]:
    planned = choice.checked.seconds if choice.checked else None
    if planned is None or planned >= calibration.step_seconds:
        return []
    steps = calibration.spent / (calibration.step_seconds - planned)
    return [f"calibrating took {seconds_as_text(calibration.spent)} s, which {counted(round(steps), 'step')} win back"]


def describe_measured(measured: Sequence[SiteMeasured]) -> list[str]:
    """Return a line for each occasion at which sites that now run were measured."""
    lines = []
    for where in dict.fromkeys(each.where for each in measured):
        own = [each for each in measured if each.where == where]
        planned, dense = sum(each.seconds for each in own), sum(each.dense_seconds for each in own)
        share = f" ({percent(planned / dense)})" if dense else ""
        seconds = f"{seconds_as_text(planned)} s a step, dense {seconds_as_text(dense)}{share}"
        lines.append(f"measured {where}: attention of {counted(len(own), 'site')} {seconds}")
    return lines
