"""What of a student learns: maps, pooling weights, biases of means, changes of projections, as one module in fp32.

The runtime reads the maps where they lie, the hooks of `deltas.py` the changes; nothing is copied between updates.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.hosts.base import Host, Site
from ...attention.kinds.kind import Learned
from ...attention.specs import SiteSpec
from ...attention.students.candidates import Candidate, Candidates
from ...attention.students.fit import check_student, student_parameters
from ...attention.students.learned import StudentParameters, new_parameters
from ..engine.recipe import FinetuneRecipe
from .deltas import Delta, as_deltas, made_whole, new_deltas, projections, read_deltas


class Trainables(nn.Module):
    """The parameters of a student in training.

    Args:
        student: one candidate per converted site.
        host, sites: of the model.
        module: the diffusion model; its projections are looked at, not changed.
        recipe: what of the student learns.
        device: of the parameters.

    Raises:
        ValueError: the student is another host's or does not fit the model, it changes weights in a way that cannot
            be trained further, or nothing of it can learn.
    """

    def __init__(
        self,
        student: Candidates,
        host: Host,
        sites: Iterable[Site],
        module: nn.Module,
        recipe: FinetuneRecipe,
        device: torch.device,
    ) -> None:
        super().__init__()
        file, sites = student.student(), tuple(sites)
        specs = check_student(file, host.name, sites)
        self.student = student
        self.specs: dict[str, SiteSpec] = {s: spec for s, spec in specs.items() if not spec.is_dense}
        given, learned = student_parameters(file, specs, sites).by_site(), {}
        for site in sites:
            start, own = new_parameters(specs[site.id], site.num_heads), given.get(site.id, Learned())
            missing = {name: value for name, value in start.items() if getattr(own, name) is None}
            learned[site.id] = replace(own, **missing)
        self.learned = StudentParameters(learned).float().requires_grad_(True)
        weights = host.site_weights(module)
        sizes = projections(module, (path for site in self.specs for path in weights[site]))
        found: dict[str, Delta] = {**new_deltas(sizes, recipe.trainables, recipe.rank, recipe.seed)}
        for path, delta in read_deltas(file.deltas).items():
            found[path] = made_whole(delta) if recipe.trainables == "full" else delta
        self._deltas = nn.ModuleList(found.values()).requires_grad_(recipe.trainables != "maps")
        self._paths = tuple(found)
        self.to(device)
        if not any(each.requires_grad for each in self.parameters()):
            raise ValueError(
                "every site of this student is dense, so there is nothing to train; lower the budget of Budget Plan, "
                "or raise its max_error"
                if not self.specs
                else "this student has no feature maps or pooling weights to train; set rank above 0 to train changes "
                "of weights"
            )

    @property
    def deltas(self) -> dict[str, Delta]:
        """The changes of projections, by path."""
        return dict(zip(self._paths, self._deltas, strict=True))  # pyright: ignore[reportReturnType]

    def groups(self, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
        """Return the parameters that learn as an optimiser takes them, each group with its learning rate."""
        maps = [each for each in self.learned.parameters() if each.requires_grad]
        deltas = [each for each in self._deltas.parameters() if each.requires_grad]
        groups = ({"params": maps, "lr": recipe.map_rate}, {"params": deltas, "lr": recipe.delta_rate})
        return [group for group in groups if group["params"]]

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by the names that they have in saved states."""
        learning = {name: each for name, each in self.named_parameters() if each.requires_grad}
        # states on disk call pooling weights so
        return {name.replace(".pool.pool", ".windows.pool"): each for name, each in learning.items()}

    def candidates(self, errors: Mapping[str, float], recipe: Mapping[str, Any]) -> Candidates:
        """Return the student as it is now.

        Args:
            errors: by site, where they were measured.
            recipe: facts about how it was trained.
        """
        learned, sites = self.learned.parameters_by_site(), {}
        for site, (candidate,) in self.student.sites.items():
            parameters: Mapping[str, Tensor] = candidate.parameters
            if site in learned:
                parameters = {name: value.cpu().clone() for name, value in learned[site].stored().items()}
            sites[site] = (Candidate(candidate.spec, errors.get(site, candidate.error), parameters),)
        return replace(self.student, sites=sites, recipe=dict(recipe), deltas=as_deltas(self.deltas))
