"""Students in memory, the one type on the socket: distilled specs per site with their errors.

Distillation makes several per site and a file holds one each. A budget chooses among them; `Candidates.student` is what
can be saved or put on a model, `Candidates.of_student` what was loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..kinds.feature_maps import Favor
from ..plans import Plan
from ..specs import SiteSpec
from ..words import counted
from .file import Role, StudentFile
from .tensor_values import below

IN_MEMORY = "a student that was not loaded from a file"


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One spec that was distilled for a site.

    Args:
        spec: kind and parameters.
        error: energy of what its output misses over the energy of the teacher's, on samples it was not trained on; NaN
            where nobody measured it.
        parameters: what was learned, by names counted from the site, such as `phi_q.weight_1` or `pool`.
    """

    spec: SiteSpec
    error: float
    parameters: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What was distilled for the sites of a model.

    Args:
        host: the architecture.
        sites: candidates by site, in the order of the host's sites; a site without any stays dense.
        deltas: changes of weights, as in `StudentFile`; they belong to one choice of candidates.
        base_model, licence, role, pair_id, recipe, fingerprint, draw: as in `StudentFile`.
        origin: the file it was read from, for records.

    Raises:
        ValueError: a site has no candidate, or weights were changed and a site has several.
    """

    host: str
    sites: Mapping[str, tuple[Candidate, ...]]
    base_model: str = ""
    licence: str = ""
    role: Role = "all"
    pair_id: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Tensor | None = None
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    draw: int = Favor.DRAW
    origin: str = IN_MEMORY

    def __post_init__(self) -> None:
        for site, candidates in self.sites.items():
            if not candidates or (self.deltas and len(candidates) > 1):
                raise ValueError(
                    f"{site} has {len(candidates)} candidates, a student with changed weights has one each"
                )

    @property
    def is_decided(self) -> bool:
        """Whether every site has one candidate only."""
        return all(len(candidates) == 1 for candidates in self.sites.values())

    def best(self) -> dict[str, int]:
        """Return, by site, the number of the candidate with the lowest error; of equal ones the first."""

        def error(candidate: Candidate) -> float:
            return math.inf if math.isnan(candidate.error) else candidate.error

        return {
            site: min(range(len(candidates)), key=lambda number: error(candidates[number]))
            for site, candidates in self.sites.items()
        }

    def chosen(self, choice: Mapping[str, int]) -> "Candidates":
        """Return one candidate per site; sites that `choice` leaves out stay dense.

        Raises:
            ValueError: a site has no candidate of that number, or one is left out though weights were changed for it.
        """
        for site, number in choice.items():
            if not 0 <= number < len(self.sites.get(site, ())):
                raise ValueError(f"{site} has {len(self.sites.get(site, ()))} candidates, none is number {number}")
        left_out = [site for site in self.sites if site not in choice]
        if self.deltas and left_out:
            raise ValueError(f"weights were changed for all sites together, so {left_out[0]} cannot be left out")
        sites = {site: (found[choice[site]],) for site, found in self.sites.items() if site in choice}
        return replace(self, sites=sites, origin=IN_MEMORY)

    def student(self, choice: Mapping[str, int] | None = None) -> StudentFile:
        """Return what a file holds: the candidate of each site that `choice` names, else the one of lowest error.

        Raises:
            ValueError: as `chosen`.
        """
        taken = self.chosen(self.best() if choice is None else choice).sites
        specs: dict[str, SiteSpec] = {site: found[0].spec for site, found in taken.items()}
        parameters = {
            f"{site}.{name}": tensor for site, found in taken.items() for name, tensor in found[0].parameters.items()
        }
        return StudentFile(
            host=self.host,
            plan=Plan.of_sites(self.host, specs),
            role=self.role,
            pair_id=self.pair_id,
            base_model=self.base_model,
            recipe=self.recipe,
            site_errors={site: found[0].error for site, found in taken.items() if math.isfinite(found[0].error)},
            licence=self.licence,
            fingerprint=self.fingerprint,
            parameters=parameters,
            deltas=self.deltas,
            origin=self.origin,
            draw=self.draw,
        )

    @classmethod
    def of_student(cls, student: StudentFile, sites: Mapping[str, SiteSpec]) -> "Candidates":
        """Return a loaded student as candidates, one per site that is not dense.

        Args:
            sites: the student's plan, resolved for the model's sites.
        """
        found = {}
        for site, spec in sites.items():
            if not spec.is_dense:
                error, parameters = student.site_errors.get(site, math.nan), below(f"{site}.", student.parameters)
                found[site] = (Candidate(spec, error, parameters),)
        return cls(
            student.host, found, student.base_model, student.licence, student.role, student.pair_id, student.recipe,
            student.fingerprint, student.deltas, student.draw, student.origin or IN_MEMORY,
        )  # fmt: skip


def decided(student: Candidates) -> tuple[Candidates, str]:
    """Return a student with one candidate per site, that of the lowest error, and a note where a site had several."""
    if student.is_decided:
        return student, ""
    sites = counted(sum(len(candidates) > 1 for candidates in student.sites.values()), "site")
    note = f"of {sites} with several candidates the one of lowest error was taken; Budget Plan chooses by cost too"
    return student.chosen(student.best()), note
