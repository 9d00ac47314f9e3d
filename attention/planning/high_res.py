"""CLEAR's high-resolution recipe as data: noise levels of a second pass, and the scale of attention.

The other half of the recipe, a larger base of the rotary embedding, is a patch of the model: `patching/install.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..specs import TRAINING_TOKENS, ClearSpec, HeadGroup, HeadSplit, SiteSpec

PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class HighResRecipe:
    """The numbers of the recipe; the defaults are those of CLEAR's notebook.

    Args:
        strength: part of the steps that run, above 0 and up to 1; more redraws more of the enlarged picture.
        steps: steps of a whole sampling, of which the last `strength` run.
        shift: moves the noise levels up, above 0; 1 leaves them evenly spaced.
        ntk_factor: multiplies the base of the rotary embedding, above 0; 1 leaves it.

    Source: CLEAR, inference_t2i_highres of github.com/Huage001/CLEAR.
    """

    strength: float = 0.7
    steps: int = 20
    shift: float = 3.0
    ntk_factor: float = 10.0


def high_res_sigmas(steps: int, strength: float, shift: float) -> Tensor:
    """Return the noise levels of a pass that starts from an enlarged picture, highest first, then 0.

    x = 1, 1 - 1/steps, ..., 1/steps; the first int(steps - steps * strength) are skipped; shift x / (1 + (shift - 1) x)

    Args:
        steps: of a whole sampling, at least 1.
        strength: part of them that runs, above 0 and up to 1; one step always does.
        shift: above 0.

    Returns:
        float32, between 2 and steps + 1 values; 1 is pure noise.

    Raises:
        ValueError: a value is out of range.

    Source: CLEAR's image-to-image pipeline, with the scheduler's dynamic shift off.
    """
    if steps < 1 or not 0 < strength <= 1 or not shift > 0:
        raise ValueError(
            "steps are at least 1, strength is above 0 and up to 1, shift is above 0, "
            f"got steps={steps}, strength={strength}, shift={shift}"
        )
    skipped = int(steps - steps * strength)
    x = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)[skipped:]
    return torch.cat([shift * x / (1 + (shift - 1) * x), x.new_zeros(1)]).float()


def with_proportional_scale(spec: SiteSpec) -> SiteSpec:
    """Return a spec whose clear windows use the proportional scale; other kinds come back as they are."""
    if isinstance(spec, ClearSpec):
        return replace(spec, proportional=True)
    if isinstance(spec, HeadSplit):
        scaled = ((group.heads, with_proportional_scale(group.spec)) for group in spec.groups)
        return HeadSplit(tuple(HeadGroup(heads, each) for heads, each in scaled if not isinstance(each, HeadSplit)))
    return spec


def describe_recipe(
    recipe: HighResRecipe, sigmas: Sequence[float], rope_base: float, specs: Mapping[str, SiteSpec], num_tokens: int
) -> list[str]:
    """Return what the recipe does at a size, a line each.

    Args:
        recipe: as asked.
        sigmas: as `high_res_sigmas` gives them.
        rope_base: of the patched model.
        specs: of every site that a plan names.
        num_tokens: tokens of the target, text included.
    """
    lines = [
        f"{len(sigmas) - 1} of {recipe.steps} steps, from sigma {sigmas[0]:.3f}",
        f"RoPE base {rope_base:,.0f}",
    ]
    factors = sorted({each.scale(1, num_tokens) for spec in specs.values() for each in _clear_specs(spec)})
    if not factors:
        return [*lines, "no site runs on clear, so attention keeps its scale; connect CLEAR Attention before this node"]
    if num_tokens <= TRAINING_TOKENS:
        note = f"{num_tokens:,} tokens: the proportional scale sharpens only above {TRAINING_TOKENS:,}"
        return [*lines, f"{note}, make the picture larger"]
    return [*lines, f"proportional scale x {', '.join(f'{factor:.3f}' for factor in factors)}"]


def size_note(width: int, height: int) -> str | None:
    """Return what is wrong with a size in pixels, if something is."""
    if width % PIXELS_PER_TOKEN == 0 and height % PIXELS_PER_TOKEN == 0:
        return None
    fitting = " x ".join(str(PIXELS_PER_TOKEN * math.ceil(each / PIXELS_PER_TOKEN)) for each in (width, height))
    return f"{width} x {height} is not made of whole tokens of {PIXELS_PER_TOKEN} pixels; use {fitting}"


def _clear_specs(spec: SiteSpec) -> list[ClearSpec]:
    return [each for each in spec.parts if isinstance(each, ClearSpec)]
