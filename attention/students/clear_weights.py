"""CLEAR's published files: whole attention projections in the diffusers naming, and pooling weights.

Reads a file's header, checks that it has what a model needs, and says where each tensor belongs in the model's own
parameters. It does not touch a model; `patching/weights.py` does. Names may carry prefixes and the file may hold more
than is needed; what is needed must be there in the right shape.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..hosts import Host
from ..hosts.base import WeightTarget
from ..shown import one_line, quote, quote_some
from ..specs import MOST_DOWN_FACTOR
from .tensor_file import TensorFile, problem

PREFIXES = ("transformer.", "module.")
POOL_SUFFIX = ".processor.spatial_weight"
NAMED_RADIUS = re.compile(r"clear_local_([0-9]{1,4})(?:_down_([0-9]{1,2}))?(?=\D|$)")
COMPARED_SITES = 8
SAME_BASE = 0.20  # of `ClearWeights.distance`, see there


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of the file and where it belongs.

    Args:
        name: of the tensor in the file.
        site: whose projection it is.
        target: the rows of the model's parameter that it replaces.
    """

    name: str
    site: str
    target: WeightTarget


@dataclass(frozen=True, slots=True)
class ClearWeights:
    """What a CLEAR file holds for one model.

    Args:
        file: the checked file.
        radius: it was distilled for, from its name or metadata; None if neither tells.
        down_factor: of its pooling weights, 1 if it has none.
        placed: every projection.
        pools: name of the pooling weight per site; empty without pooled tokens.
        ignored: tensors that no site needs.
        num_sites: attention modules that the file has projections for; a shallower model needs some of them only.
    """

    file: TensorFile
    radius: int | None
    down_factor: int
    placed: tuple[Placed, ...]
    pools: Mapping[str, str]
    ignored: tuple[str, ...]
    num_sites: int

    def projections(self, sites: Sequence[str]) -> list[tuple[str, WeightTarget, Tensor]]:
        """Return (site, rows, tensor) for the projections of `sites`, read now.

        Raises:
            FileProblem: a tensor holds an infinity or a NaN.
        """
        chosen = [each for each in self.placed if each.site in set(sites)]
        tensors = self.file.load([each.name for each in chosen])
        return [(each.site, each.target, tensors[each.name]) for each in chosen]

    def pool_weights(self, sites: Sequence[str]) -> dict[str, Tensor]:
        """Return the (d, d) pooling weight of each of `sites`, empty without pooled tokens."""
        pools = {site: self.pools[site] for site in sites if site in self.pools}
        tensors = self.file.load(pools.values())
        d = self.down_factor
        return {site: tensors[name].reshape(d, d).float() for site, name in pools.items()}

    def distance(self, read: Callable[[str], Tensor]) -> float:
        """Return |own - file| / |file| over the weights of some projections: how far a model is from the file's base.

        A file's projections began as those of its base, so a model that is this base has similar ones. Infinite where
        the model's own have other shapes, as those do that are packed in a form nobody could unpack.

        Args:
            read: returns a parameter of the model as numbers and without patches, by `WeightTarget.key`.

        Notes:
            Below `SAME_BASE` a model passes for the base or a close relative. That bound is not measured on the
            released models, which were not at hand. It rests on what is known: copies are 3 % (float8_e4m3fn) to 5 %
            (e5m2) from what they were made of, 9 % in nvfp4 and 15 % in 4-bit ConvRot; unrelated matrices are 141 %
            apart; independent changes add as squares, so training may have moved the file by 13 % even where the
            copy is the coarsest. A light fine-tune can lie below the bound too. LoRAs on the model are not read.
        """
        sites = list(dict.fromkeys(each.site for each in self.placed))
        chosen = set(sites[:: -(-len(sites) // COMPARED_SITES)])
        compared = [each for each in self.placed if each.site in chosen and len(each.target.shape) == 2]
        apart = size = 0.0
        for key in dict.fromkeys(each.target.key for each in compared):
            own, rows = read(key), [each for each in compared if each.target.key == key]
            tensors = self.file.load([each.name for each in rows])
            for each in rows:
                stored, start = tensors[each.name].float(), each.target.start
                mine = own[start : start + each.target.shape[0]].float()
                if mine.shape != stored.shape:
                    return float("inf")
                apart += float((mine - stored).square().sum())
                size += float(stored.square().sum())
        return (apart / size) ** 0.5 if size else float("inf")


def clear_weights(file: TensorFile, host: Host, module: Any) -> ClearWeights:
    """Return what a CLEAR file holds for a model, judged by its header alone.

    Args:
        file: an opened file.
        host, module: the architecture and the diffusion model that shall receive the weights.

    Raises:
        FileProblem: nobody publishes such weights for this host, or a needed tensor is missing or has another shape;
            the sentence counts them and names the first.

    Source: files of Huage001/CLEAR on the Hub, after the names that its training script saves.
    """
    targets, sites = host.diffusers_targets(module), host.diffusers_sites(module)
    if not targets:
        raise problem(file.path, f"cannot be used: there are no CLEAR weights for {host.title}; choose weights none")
    names: dict[str, str] = {}
    for name in file.tensors:
        key = _without_prefix(name)
        if key in names and key in targets:
            raise problem(file.path, f"holds {one_line(key)} twice, as {one_line(names[key])} and as {one_line(name)}")
        names[key] = name
    _check_projections(file, names, targets, host)
    placed = tuple(Placed(names[key], _site(key, sites), target) for key, target in targets.items())
    pools = {site: names[key] for attn, site in sites.items() if (key := attn + POOL_SUFFIX) in names}
    down_factor = _down_factor(file, pools, len(sites))
    used = {each.name for each in placed} | set(pools.values())
    radius = _named_radius(file)
    num_sites = sum(key.endswith(".attn.to_q.weight") for key in names)
    return ClearWeights(file, radius, down_factor, placed, pools, tuple(sorted(set(file.tensors) - used)), num_sites)


def published_radius(file_name: str) -> tuple[int, int] | None:
    """Return (radius, down_factor) that a published file's name tells, such as `clear_local_8_down_4.safetensors`."""
    found = NAMED_RADIUS.search(file_name)
    return (int(found[1]), int(found[2] or 1)) if found else None


def _named_radius(file: TensorFile) -> int | None:
    for key in ("radius", "window_size"):
        if re.fullmatch(r"[0-9]{1,4}", file.metadata.get(key, "")):
            return int(file.metadata[key])
    named = published_radius(file.path.name)
    return named[0] if named else None


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return _without_prefix(name[len(prefix) :])
    return name


def _site(key: str, sites: Mapping[str, str]) -> str:
    return next(site for attn, site in sites.items() if key.startswith(attn + "."))


def _check_projections(
    file: TensorFile, names: Mapping[str, str], targets: Mapping[str, WeightTarget], host: Host
) -> None:
    if file.metadata.get("format", "").startswith("linearize/"):
        raise problem(file.path, "is a student; load it with Load Linearized Attention")
    missing = [key for key in targets if key not in names]
    if missing:
        raise problem(
            file.path,
            f"holds {len(targets) - len(missing)} of the {len(targets)} attention tensors that this"
            f" {host.title} needs, the first missing one is {missing[0]}; it belongs to another model",
        )
    for key, target in targets.items():
        found = file.tensors[names[key]]
        if found.shape != target.shape:
            raise problem(
                file.path,
                f"belongs to another model: {one_line(names[key])} has shape {quote(found.shape)} where this"
                f" {host.title} needs {target.shape}",
            )
        if not found.dtype.is_floating_point:
            raise problem(
                file.path, f"does not fit: {one_line(names[key])} holds {found.dtype}, not floating point numbers"
            )


def _down_factor(file: TensorFile, pools: Mapping[str, str], num_sites: int) -> int:
    if not pools:
        return 1
    if len(pools) != num_sites:
        raise problem(file.path, f"holds pooling weights for {len(pools)} of {num_sites} sites")
    shapes = {file.tensors[name].shape for name in pools.values()}
    shape = next(iter(shapes))
    sides = [size for size in shape if size != 1] or [1, 1]
    if len(shapes) > 1 or len(sides) != 2 or sides[0] != sides[1] or not 2 <= sides[0] <= MOST_DOWN_FACTOR:
        raise problem(
            file.path,
            f"does not fit: pooling weights have the shapes {quote_some(sorted(shapes))},"
            " where (1, 1, 1, d, 1, d, 1) is known",
        )
    return sides[0]
