"""The families the host contract is tested on: a tiny model of ComfyUI's own class each, and what its calls look like.

Each file `family_<name>.py` beside this one holds a tuple FAMILIES, which is collected here; `test_contract.py` runs
everything on all of them. Expectations in a `Case` are written by hand, never computed by the pack.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Segment = tuple[str, int, tuple[int, int, int] | None]  # role, tokens, grid


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forward of a family: the sizes that go in, and what must be seen.

    Args:
        latent: (height, width) or (frames, height, width) of the latent.
        segments: the layout of every site's call, in sequence order.
        own_segments: by site, where a call has other tokens than `segments`.
        batch, text: size of the batch, and number of text tokens.
        references: sizes of reference latents.
        options: whatever else the family's `inputs` understands.
        calls: every attention call in order, as (site or None, query tokens, key tokens); None stands for each site
            once, with as many tokens as the segments have.
        probes: (input, index, tokens): adding 1 to `inputs.named(input)[index]`, for all of the batch, changes the
            queries of these tokens at the first site and of no others. "parameter:<name>" is a parameter of the model.
        pixels: (width, height, frames) for which `planned_layout` tells these segments.
        declines: codes of the reasons for which every site must decline; empty means that every site runs.
        reason: words that the reason of those declines must hold.
    """

    latent: tuple[int, ...]
    segments: tuple[Segment, ...]
    own_segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    batch: int = 1
    text: int = 5
    references: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[tuple[str | None, int, int], ...] | None = None
    probes: tuple[tuple[str, Any, set[int]], ...] = ()
    pixels: tuple[int, int, int] | None = None
    declines: frozenset[str] = frozenset()
    reason: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length, _ in self.segments)

    def at(self, site: str) -> tuple[Segment, ...]:
        """Return the segments of one site."""
        return self.own_segments.get(site, self.segments)

    def tokens_at(self, site: str) -> int:
        """Return the number of tokens of one site."""
        return sum(length for _, length, _ in self.at(site))

    @property
    def main(self) -> tuple[int, tuple[int, int, int]]:
        """(first token, grid) of the segment that the latent becomes."""
        start = 0
        for role, length, grid in self.segments:
            if role == "main":
                assert grid is not None
                return start, grid
            start += length
        raise AssertionError("a case has a main segment")


@dataclass
class Inputs:
    """The tensors of one forward; `extra` holds what only this family takes, by the name of the argument."""

    latent: Tensor
    text: Tensor
    references: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def named(self, path: str) -> Tensor:
        """Return the tensor "latent", "text", or of that name in `extra`; "references.0" is the first of a list."""
        name, _, number = path.partition(".")
        found = getattr(self, name) if name in ("latent", "text", "references") else self.extra[name]
        return found[int(number)] if number else found


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family and its tiny model.

    Args:
        name: of the family; several may share a host.
        host: name of the host that must recognise the model.
        build: makes the model; weights are seeded by `seeded`.
        inputs: makes the inputs of a case.
        forward: runs the model on inputs with these transformer options, as ComfyUI does.
        sites: ids in the order they run.
        heads, head_dim: of each site's calls.
        patch: latent cells of a token along each axis of `Case.latent`.
        cases: by name; "plain" is the one that the slower checks use.
        batches: whether ComfyUI runs more than one item at a time; if so, a case has a batch of 2.
        oracle: makes the model for the probes, where `build`'s mixes tokens before the first site (refiners).
    """

    name: str
    host: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Case], Inputs]
    forward: Callable[[nn.Module, Inputs, dict[str, Any]], Tensor]
    sites: tuple[str, ...]
    heads: int
    head_dim: int
    patch: tuple[int, ...]
    cases: Mapping[str, Case]
    batches: bool = True
    oracle: Callable[[], nn.Module] | None = None


def seeded(model: nn.Module) -> nn.Module:
    """Return the model with random weights that depend on the names of its parameters only, without gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model.requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def default_operations() -> dict[str, Any]:
    """Return the arguments that every model of ComfyUI takes: fp32 on the CPU, weights as they are."""
    import comfy.ops

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def through_apply_model(
    model: nn.Module, latent: Tensor, text: Tensor, options: dict[str, Any], **conditions: Any
) -> Tensor:
    """Run a model inside of ComfyUI's outer one, for families that no wrapper of the diffusion model exists for."""
    from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

    def apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **conditions):
        return model(x, t, context=c_crossattn, control=control, transformer_options=transformer_options, **conditions)

    wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, options)
    executor = WrapperExecutor.new_class_executor(apply_model, SimpleNamespace(diffusion_model=model), wrappers)
    time = torch.full((latent.shape[0],), 0.5)
    return executor.execute(latent, time, None, text, None, options, **conditions)


def each_site(sites: tuple[str, ...], tokens: int) -> tuple[tuple[str | None, int, int], ...]:
    """Return one self-attention call per site, for `Case.calls`."""
    return tuple((site, tokens, tokens) for site in sites)


def tokens_of_patch(case: Case, patch: tuple[int, ...], cell: tuple[int, ...]) -> set[int]:
    """Return the tokens that hold a value of one latent patch; ComfyUI pads a latent with its own first cells."""
    start, grid = case.main
    axes = []
    for index, size, side, count in zip(cell, case.latent, patch, grid[-len(patch) :], strict=True):
        changed = set(range(index * side, min((index + 1) * side, size)))
        axes.append([n for n in range(count) if any(p % size in changed for p in range(n * side, (n + 1) * side))])
    frames = [[0]] if len(patch) == 2 else []
    _, height, width = grid
    return {start + (t * height + y) * width + x for t, y, x in itertools.product(*frames, *axes)}


def patch_slices(patch: tuple[int, ...], cell: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the index of one latent patch, over (batch, channels, ...)."""
    spatial = (slice(i * side, (i + 1) * side) for i, side in zip(cell, patch, strict=True))
    return (slice(None), slice(None), *spatial)


def cells_to_probe(case: Case, patch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the first cell, one in the middle and the last whole one of the latent."""
    counts = [max(size // side, 1) for size, side in zip(case.latent, patch, strict=True)]
    picks = [tuple(0 for _ in counts), tuple(n // 2 for n in counts), tuple(n - 1 for n in counts)]
    return list(dict.fromkeys(picks))


def seen_from(case: Case, token: int, radius: int, temporal_radius: int) -> set[int]:
    """Return the tokens that see a main token under CLEAR: all global ones, and those inside the disc around it."""
    start, (frames, height, width) = case.main
    place = token - start
    t, y, x = place // (height * width), place // width % height, place % width
    seen = {n for n in range(case.num_tokens) if not start <= n < start + math.prod(case.main[1])}
    for a, b, c in itertools.product(range(frames), range(height), range(width)):
        temporal = (a - t) * radius / temporal_radius if temporal_radius else 0.0
        if temporal**2 + (b - y) ** 2 + (c - x) ** 2 < radius**2:
            seen.add(start + (a * height + b) * width + c)
    return seen


def collect() -> tuple[Family, ...]:
    """Return the families of all `family_*.py` files, by file name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("family_*.py"))
    found = tuple(family for name in names for family in importlib.import_module(name).FAMILIES)
    assert len({family.name for family in found}) == len(found), "two families have one name"
    return found
