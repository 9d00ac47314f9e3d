"""How much a student misses on held-out draws: of the velocity, and of the attention of each converted site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.layout import TokenLayout
from ...attention.site_call import SiteCall
from ...attention.specs import SiteSpec
from ..engine.loop import Say
from ..engine.losses import energies
from ..engine.protocols import BlockCall, Draw, Trainee


@dataclass(frozen=True, slots=True)
class Errors:
    """What a student misses, as energies over the teacher's.

    Args:
        velocity: of the whole model's prediction.
        sites: of the attention outputs of converted sites, each on the teacher's inputs.
    """

    velocity: float
    sites: Mapping[str, float]


@torch.no_grad()
def measure(trainee: Trainee, specs: Mapping[str, SiteSpec], draws: Sequence[Draw], say: Say) -> Errors:
    """Return what a student misses.

    Args:
        trainee: the teacher, with the student installed.
        specs: of the converted sites.
        draws: that nothing was learned from.
        say: told which one is measured.

    Raises:
        ValueError: the model calls its attention without ComfyUI's.
    """
    velocity, sites = [0.0, 0.0], dict[str, list[float]]()

    def compare(block: BlockCall) -> None:
        def see(call: SiteCall) -> None:
            if call.site in specs and isinstance(call.layout, TokenLayout):
                rows, teacher = call.grid_tokens(), block.attention[call.site]
                _add(sites.setdefault(call.site, [0.0, 0.0]), call.output[:, :, rows], teacher[:, :, rows])

        if any(site in specs for site in block.sites):
            block.run(see)

    for number, draw in enumerate(draws, 1):
        say(f"measuring on held-out sample {number} of {len(draws)}")
        teacher = trainee.each_block(draw, compare)
        _add(velocity, trainee.predict(draw), teacher)
    if not sites and sites_in_blocks(trainee) & specs.keys():
        raise ValueError(NOT_CALLED)
    return Errors(velocity[0] / velocity[1], {site: missed / whole for site, (missed, whole) in sites.items()})


NOT_CALLED = (
    "the model ran without calling the student's sites through ComfyUI's attention; take out the node that replaces "
    "its attention"
)


def sites_in_blocks(trainee: Trainee) -> set[str]:
    """Return the sites that lie in some block of the model."""
    return {site for sites in trainee.blocks.values() for site in sites}


def _add(total: list[float], output: Tensor, teacher: Tensor) -> None:
    missed, whole = energies(output, teacher)
    total[0] += missed
    total[1] += whole
