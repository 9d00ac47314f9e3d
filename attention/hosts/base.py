"""What the pack needs to know about an architecture: its sites, and the token layout of a call.

A host recognises a model by structure, never by class, so that quantised and wrapped modules are recognised too. It
computes nothing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..layout import Grid, Reason, Segment, TokenLayout, grid_segment, reference_segment
from .site_hooks import current_site


@dataclass(frozen=True, slots=True)
class Site:
    """One self-attention of a model: a stable id such as `single.17`, and its sizes."""

    id: str
    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where a tensor in the diffusers naming belongs in a host's own, possibly fused, parameter.

    Args:
        key: the host's parameter, counted from the diffusion model, such as `double_blocks.0.img_attn.qkv.weight`.
        start: first row of the parameter that the tensor stands for.
        shape: of the tensor; it takes `shape[0]` rows.
    """

    key: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One forward as the host application calls it.

    Args:
        module: the diffusion model.
        args, kwargs: those of the diffusion model, or of the model around it; see `Host.wrapped`.
        dtype: in which the diffusion model computes, where the latent among the arguments does not tell it yet.
    """

    module: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype | None = None

    def argument(self, position: int, name: str) -> Any:
        """Return an argument given by position or by name, else None."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def latent(self) -> Any:
        """The latent; of a video with sound, the video's."""
        found = self.argument(0, "x")
        return found[0] if isinstance(found, list | tuple) else found


class Host(Protocol):
    """An architecture. One instance per architecture; it holds no state. Classes inherit what has a body here.

    `wrapped` is the call whose arguments `layout` reads: "diffusion_model", or "apply_model" (x, t, c_concat,
    c_crossattn, control, transformer_options and conditions by name) where ComfyUI wraps no other call of the family.
    """

    name: str
    title: str
    default_text_tokens: int
    wrapped: str = "diffusion_model"

    def mismatch(self, module: Any) -> Reason | None:
        """Return why `module` is not of this architecture, or None if it is."""
        ...

    def sites(self, module: Any) -> tuple[Site, ...]:
        """Return the self-attention sites in the order they run."""
        ...

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """Return the tokens of the self-attentions of this forward, or why they cannot be told."""
        ...

    def site_layout(self, site: str, layout: TokenLayout) -> TokenLayout:
        """Return the tokens of one site, where they are not all tokens of `layout`."""
        return layout

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """Return the layout for a picture or clip of this many pixels and frames, before anything runs."""
        ...

    def makes_clips(self, module: Any) -> bool:
        """Return whether a clip has several frames of tokens; pictures have one."""
        return any(grid[0] > 1 for _, grid in self.planned_layout(module, 512, 512, 81, 0).grids)

    def diffusers_targets(self, module: Any) -> dict[str, WeightTarget]:
        """Return, by diffusers name, where the projections of the sites lie; empty if nobody publishes any."""
        return {}

    def diffusers_sites(self, module: Any) -> dict[str, str]:
        """Return the site of each attention module, by its diffusers name such as `transformer_blocks.3.attn`."""
        return {}

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """Return the names of norm weights, in the order of the sites, that tell one base model from another."""
        ...

    def site_modules(self, module: Any) -> dict[str, str]:
        """Return, by site, the dotted path of the module whose forward issues that attention call and no other.

        Only for architectures whose transformer options do not name the site. Where one module issues the calls of
        several sites, the first stands for all, and `site_among` tells them apart.
        """
        return {}

    def site_blocks(self, module: Any) -> dict[str, str]:
        """Return, by site, the dotted path of its block, for architectures whose transformer options name the block.

        Other nodes may run several blocks inside one, and the options then name that one for all of them. Empty where
        a block has several sites.
        """
        if self.site_modules(module):
            return {}
        named = zip(self.sites(module), self.norm_parameters(module), strict=True)
        blocks = {site.id: ".".join(norm.split(".")[:2]) for site, norm in named}
        return blocks if len(set(blocks.values())) == len(blocks) else {}

    def site_weights(self, module: Any) -> dict[str, tuple[str, ...]]:
        """Return, by site, the paths of the modules with its projections and their norms, of text and image alike.

        Here: the module that issues the call, or else the one that its norm lies in.
        """
        modules, norms = self.site_modules(module), self.norm_parameters(module)
        named = zip(self.sites(module), norms, strict=True)
        return {site.id: (modules.get(site.id, norm.rsplit(".", 2)[0]),) for site, norm in named}

    def site_of(self, options: Mapping[str, Any]) -> str | None:
        """Return the site that issues a self-attention call with these transformer options; None for other calls.

        Architectures with `site_modules` inherit this.
        """
        return current_site()

    def site_among(self, site: str, layout: TokenLayout, num_tokens: int) -> str:
        """Return which of the sites that `site` stands for issues a call of so many tokens."""
        return site


def missing_attributes(module: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """Return those of the dotted attribute paths that `module` lacks; numbers index into lists."""
    return tuple(path for path in paths if not _has(module, path))


def _has(module: Any, path: str) -> bool:
    for part in path.split("."):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError, KeyError, TypeError):
            return False
    return True


def missing_structure(title: str, module: Any, paths: Sequence[str]) -> Reason | None:
    """Return which of the attribute paths that models of this title have `module` lacks, or None."""
    missing = missing_attributes(module, paths)
    return Reason("structure", f"{title} models have {', '.join(missing)}") if missing else None


def wrong_inputs(title: str, latent: Any, dimensions: Sequence[int], text: Any) -> Reason | None:
    """Return why a latent and its text cannot tell a token grid, or None if they can.

    Args:
        dimensions: of a latent of this architecture, batch and channels included; text has 3.
    """
    if getattr(latent, "ndim", 0) in dimensions and getattr(text, "ndim", 0) == 3:
        return None
    needed = " or ".join(f"{n}-D" for n in dimensions)
    return Reason("arguments", f"{title} was called without the {needed} latent and 3-D text that tell its token grid")


def grid_of(latent: Any, patch: Sequence[int]) -> Grid:
    """Return the grid of tokens of a latent; ComfyUI pads it where the patch does not divide it.

    Args:
        patch: latent cells per token, for (height, width) or (frames, height, width).
    """
    sides = [math.ceil(size / side) for size, side in zip(latent.shape[-len(patch) :], patch, strict=True)]
    frames, height, width = [1, *sides][-3:]
    return frames, height, width


def main_segment(latent: Any, patch: Sequence[int]) -> Segment:
    """Return the grid that the latent itself becomes."""
    return grid_segment("main", *grid_of(latent, patch))


def reference_segments(latents: Sequence[Any] | None, patch: Sequence[int]) -> list[Segment]:
    """Return the global tokens of each reference latent, with their place."""
    return [reference_segment(grid_of(latent, patch)) for latent in latents or ()]


def planned_main(width: int, height: int, side: int, frames: int = 1) -> Segment:
    """Return the grid of a picture or clip of so many pixels, `side` pixels per token, and so many latent frames."""
    return grid_segment("main", frames, math.ceil(height / side), math.ceil(width / side))


def numbered_sites(group: str, count: int, num_heads: int, head_dim: int) -> tuple[Site, ...]:
    """Return the sites `group.0`, `group.1`, and so on, of one size."""
    return tuple(Site(f"{group}.{i}", num_heads, head_dim) for i in range(count))


def site_of_block(options: Mapping[str, Any], groups: Mapping[str, str]) -> str | None:
    """Return the site of the block that the transformer options name.

    Args:
        groups: by `block_type`, what the ids of its sites begin with. Refiners run before there is a `block_index`.
    """
    group, index = groups.get(options.get("block_type", "")), options.get("block_index")
    return None if group is None or index is None else f"{group}.{index}"


def rows_of(name: str, parts: Sequence[str], key: str, rows: Sequence[int], columns: int) -> dict[str, WeightTarget]:
    """Return where the weights of projections lie that the host keeps as rows of one parameter, in this order.

    Args:
        name, parts: the diffusers names of the attention module and of its projections.
        key: the host's parameter, without `.weight`.
        rows, columns: how many rows each projection has, and the width of the input.
    """
    starts = itertools.accumulate(rows, initial=0)
    return {
        f"{name}.{part}.weight": WeightTarget(f"{key}.weight", start, (size, columns))
        for part, start, size in zip(parts, starts, rows, strict=False)
    }


def with_biases(targets: Mapping[str, WeightTarget]) -> dict[str, WeightTarget]:
    """Return weights and, for each, the bias beside it."""
    biases = {
        name.removesuffix("weight") + "bias": WeightTarget(
            target.key.removesuffix("weight") + "bias", target.start, target.shape[:1]
        )
        for name, target in targets.items()
    }
    return {**targets, **biases}
