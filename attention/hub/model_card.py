"""What a student's file tells of itself: in lines on a node, and as a model card for the Hub.

Every figure comes from the file, where distillation wrote it; nothing is measured or claimed here.
"""

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..hosts import HOSTS
from ..planning.report import describe_spec
from ..shown import LONGEST_REASON, one_line
from ..specs import DenseSpec, SiteSpec
from ..students.file import StudentFile, unfinished_stages
from ..words import file_size
from .transfer import HubFile

HOMEPAGE = "https://github.com/linearize/linearize"
REST = "all other sites"
LONGEST_NAME = 200  # of a model on the Hub
MOST_LINES = 400  # of a list from the file
HUB_MODEL = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_LICENCES = {  # what the Hub takes as `license`; everything else is "other" with a name
    "apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "bigscience-openrail-m", "bsd-2-clause",
    "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unlicense",
}  # fmt: skip
ROLE_TEXTS = {
    "all": "the whole model",
    "high": "the expert of high noise levels",
    "low": "the expert of low noise levels",
}


@dataclass(frozen=True, slots=True)
class SpecErrors:
    """What some sites run, and the held-out errors of those that were measured.

    Args:
        spec: kind and parameters.
        sites: a site expression, or REST.
        errors: by site.
    """

    spec: SiteSpec
    sites: str
    errors: Mapping[str, float]


def spec_errors(student: StudentFile) -> tuple[SpecErrors, ...]:
    """Return what a student runs, spec by spec, without dense sites."""
    expressions: dict[SiteSpec, list[str]] = {}
    for expression, spec in (*student.plan.rules, (REST, student.plan.default)):
        if spec != DenseSpec():
            expressions.setdefault(spec, []).append(expression)
    specs = {site: student.plan.spec_of(site) for site in student.site_errors}
    return tuple(
        SpecErrors(
            spec, ",".join(named), {site: error for site, error in student.site_errors.items() if specs[site] == spec}
        )
        for spec, named in expressions.items()
    )


def describe_errors(errors: Mapping[str, float]) -> str:
    """Return mean and highest error of sites in a few words."""
    if not errors:
        return "no error measured"
    worst = max(errors, key=lambda site: errors[site])
    return (
        f"error mean {_mean(errors):.4g}, highest {errors[worst]:.4g} at {one_line(worst)}, of {len(errors)} measured"
    )


def describe_student(student: StudentFile) -> tuple[str, ...]:
    """Return lines for people: base and licence, then a line per spec with its sites and errors."""
    base = one_line(student.base_model or "an unnamed model", LONGEST_NAME)
    licence = f"licence {one_line(student.licence, LONGEST_NAME)}"
    if not student.licence:
        licence = "no licence stated; name one before you share it"
    stages = unfinished_stages(student.recipe)
    lines = [f"UNFINISHED: {stages}"] if stages else []
    lines += [f"student of {base} ({_title(student)}), {licence}"]
    rows = spec_errors(student)
    lines += [
        f"{describe_spec(row.spec)} at {one_line(row.sites, LONGEST_REASON)}: {describe_errors(row.errors)}"
        for row in rows[:MOST_LINES]
    ]
    return (*lines, *(() if rows else ("every site stays dense",)))


def model_card(student: StudentFile, file: HubFile, size: int, picture: str = "") -> str:
    """Return a model card: YAML that the Hub reads, then Markdown.

    Args:
        student: as the file holds it.
        file: what it is called on the Hub.
        size: of the file, in bytes.
        picture: name of a picture that lies beside the card; empty for none.
    """
    from huggingface_hub import ModelCard, ModelCardData

    is_known = student.licence.lower() in HUB_LICENCES
    names_base = len(student.base_model) <= LONGEST_NAME and HUB_MODEL.fullmatch(student.base_model) is not None
    data = ModelCardData(
        license=student.licence.lower() if is_known else ("other" if student.licence else None),
        license_name=None if is_known or not student.licence else _slug(student.licence),
        base_model=student.base_model if names_base else None,
        base_model_relation="adapter" if names_base else None,
        tags=["linearize", "comfyui", "linear-attention", f"linearize-{_slug(student.host)}"],
    )
    body = [
        f"# {PurePosixPath(file.repo).name}", "",
        f"Attention of {_cell(_title(student))} with linear cost, distilled with [Linearize]({HOMEPAGE}) for ComfyUI.",
        "",
        *_unfinished(student),
        *_facts(student, file, size), "",
        *_picture(picture),
        *_attention(student), "",
        "## How to use it", "",
        f"1. Install [Linearize]({HOMEPAGE}) in ComfyUI.",
        f"2. Put `{PurePosixPath(file.file).name}` into `models/linearize`, or write `{file}` into `hub_file` of *Load"
        " Linearized Attention* and switch `allow_download` on.",
        "3. Place *Load Linearized Attention* between the model's loader and the sampler.", "",
        "## How it was trained", "",
        *_recipe(student),
    ]  # fmt: skip
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body) + "\n")
    return str(card).encode("utf-8", "replace").decode("utf-8")  # JSON can spell half a character


def _picture(name: str) -> list[str]:
    if not name:
        return []
    words = "One picture: an impression, not a measurement."
    return ["## What it paints", "", f"![Pictures of this student and of its teacher]({name})", "", words, ""]


def _unfinished(student: StudentFile) -> list[str]:
    stages = unfinished_stages(student.recipe)
    words = f"**Unfinished**: training was cancelled ({_cell(stages)}). Expect less than of a finished run."
    return [words, ""] if stages else []


def _facts(student: StudentFile, file: HubFile, size: int) -> list[str]:
    rows = {
        "architecture": _title(student),
        "base model": student.base_model or "not stated",
        "licence": student.licence or "not stated; that of the base model may hold",
        "made for": ROLE_TEXTS[student.role],
        "file": f"{file.file}, {file_size(size)}",
        "changes weights": "yes" if student.deltas else "no",
    }
    if student.pair_id:
        rows["pair"] = student.pair_id
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())]


def _attention(student: StudentFile) -> list[str]:
    rows = spec_errors(student)
    if not rows:
        return ["## Attention", "", "Every site stays dense."]
    lines = [
        "## Attention",
        "",
        "| attention | sites | measured | mean error | highest error |",
        "|---|---|---:|---:|---|",
    ]
    for row in rows[:MOST_LINES]:
        worst = max(row.errors, key=lambda site: row.errors[site], default="")
        figures = f"{_mean(row.errors):.4g} | {row.errors[worst]:.4g} at {_cell(worst)}" if worst else "not measured | "
        lines.append(f"| {_cell(describe_spec(row.spec))} | {_cell(row.sites)} | {len(row.errors)} | {figures} |")
    if student.plan.default == DenseSpec():
        lines += ["", "All other sites stay dense."]
    return [
        *lines, "",
        "The error of a site is the energy of what its attention output misses over the energy of the original's, on"
        " samples that were not trained on. Nothing else was measured.",
    ]  # fmt: skip


def _recipe(student: StudentFile) -> list[str]:
    if not student.recipe:
        return ["The file does not say."]
    text = json.dumps(dict(student.recipe), indent=2, ensure_ascii=False).replace("`", "\\u0060")
    return ["```json", *(one_line(line, LONGEST_REASON) for line in text.split("\n")[:MOST_LINES]), "```"]


def _title(student: StudentFile) -> str:
    return next((host.title for host in HOSTS if host.name == student.host), one_line(student.host))


def _mean(errors: Mapping[str, float]) -> float:
    return statistics.fmean(errors.values()) if errors else math.nan


def _cell(text: str) -> str:
    """Return a text from a file on one line, with nothing that Markdown or HTML would act on."""
    text = re.sub(r"([!#$%&*:;<=>?@\[\\\]^_`{|}~])", r"\\\1", one_line(" ".join(text.split()), LONGEST_REASON))
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "not-named"
