"""A radius per head: wide windows for heads that look far, narrow ones for others, at equal cost.

Tried and not kept in the pack: `results.csv` says what it gains over one radius for all.
"""

from typing import Any

import torch

RADII = (2, 3, 4, 5, 6, 8, 12, 64)  # the last one sees everything at the sizes here
DRAWS = 12  # teacher forwards that are looked at, over noise levels from 0.1 to 0.9 of the way


def plan_by_mass(laboratory: Any, radius: int) -> Any:
    """Return a plan of windows with a radius per head, and as many visible pairs as one `radius` everywhere leaves.

    The sum over heads of the attention that falls outside of the window is the least possible at that cost.
    """
    specs, knapsack = laboratory.module("attention.specs"), laboratory.module("attention.planning.knapsack")
    outside, pairs, tokens = _outside(laboratory)
    heads = []
    for (site, head), masses in outside.items():
        options = tuple(
            knapsack.Option(number, specs.ClearSpec(each), mass, pairs[each])
            for number, (each, mass) in enumerate(zip(RADII, masses, strict=True))
        )
        heads.append(knapsack.SiteOptions(f"{site} {head}", tokens**2, options))
    found = knapsack.plan_under_budget(heads, pairs[radius] / tokens**2, "optimal")[0].chosen
    radii: dict[str, list[int]] = {}
    for site, head in outside:
        option = found.get(f"{site} {head}")
        radii.setdefault(site, []).append(RADII[-1] if option is None else option.spec.radius)
    rules = tuple((site, specs.radius_per_head(tuple(each))) for site, each in radii.items())
    return laboratory.module("attention.plans").Plan(laboratory.teacher.host, rules=rules)


def _outside(laboratory: Any) -> tuple[dict[tuple[str, int], list[float]], dict[int, int], int]:
    """Return the mean attention outside of each radius by site and head, visible pairs by radius, and the tokens."""
    specs, reference = laboratory.module("attention.specs"), laboratory.module("attention.kinds.reference")
    protocols, teachers = laboratory.module("training.engine.protocols"), laboratory.module("training.comfyui.teacher")
    sums: dict[tuple[str, int], torch.Tensor] = {}
    masks: list[torch.Tensor] = []

    def observe(call: Any) -> None:
        if not masks:
            found = (reference.clear_mask(call.layout, specs.ClearSpec(radius)) for radius in RADII)
            masks.extend(mask.to(call.query.device) for mask in found)
        scale = call.scale or call.query.shape[-1] ** -0.5
        scores = torch.einsum("bhid,bhjd->hij", call.query.float(), call.key.float()) * scale
        assert len(call.query) == 1, "the sums over heads take no batch"
        weights = scores.softmax(-1)
        for head, each in enumerate(weights):
            outside = torch.stack([each.masked_fill(mask, 0).sum(-1).mean() for mask in masks]).cpu()
            sums[call.site, head] = sums.get((call.site, head), torch.zeros(len(RADII))) + outside

    def work(teacher: Any) -> None:
        for number in range(DRAWS):
            teacher.watch(protocols.Draw(number, 0.1 + 0.8 * number / (DRAWS - 1), number), observe)

    teachers.with_teacher(laboratory.model, laboratory.samples("teacher"), work)
    pairs = {radius: int(mask.sum()) for radius, mask in zip(RADII, masks, strict=True)}
    return {key: (each / DRAWS).tolist() for key, each in sums.items()}, pairs, len(masks[0])
