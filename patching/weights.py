"""Weights that a node puts on a model patcher, site by site: distilled projections, a student's deltas.

They lie under every LoRA, whichever node came first. What they are is read elsewhere.
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ..attention.hosts import WeightTarget
from ..attention.runtime.runtime import SiteSettings

PROJECTIONS = "linearize"  # attachment: by site, the patches of its distilled projections
DELTAS = "linearize_deltas"  # attachment: the trained sites that a student still has, and its `Delta`s
MERGES = "linearize_merges"  # attachment: how many merges other nodes had made when a node of the pack came last
DELTA_SUFFIX = re.compile(r"\.(lora_up|lora_down|lora_A|lora_B|alpha|diff_b|diff|set_weight)(?:\.weight)?$")
PlacedTensor = tuple[str, WeightTarget, Tensor]  # site, rows of the model's parameter, what replaces them
Delta = tuple[str, Any, frozenset[str]]  # parameter, its patch, the sites whose attention it is part of


def replace_projections(patched: Any, sites: Iterable[str], projections: Sequence[PlacedTensor]) -> None:
    """Put whole projections under all other patches of a clone, so that LoRAs before and after add to them.

    What an earlier Linearize node put there for the same sites is taken away first.

    Raises:
        ValueError: the model lacks a parameter.
    """
    earlier: dict[str, list[tuple[str, Any]]] = dict(patched.get_attachment(PROJECTIONS) or {})
    for site in sites:
        take_away(patched, earlier.pop(site, []))
    requested = {
        (f"diffusion_model.{target.key}", (0, target.start, target.shape[0])): (site, ("set", (tensor,)))
        for site, target, tensor in projections
    }
    accepted = patched.add_patches({place: value for place, (_, value) in requested.items()})
    if len(accepted) != len(requested):
        missing = sorted(key for key, _ in set(requested) - set(accepted))
        raise ValueError(f"this model has no parameter {missing[0]} to put distilled weights into")
    for (key, _), (site, value) in requested.items():
        earlier[site] = [*earlier.get(site, []), (key, _put_under(patched, key, value))]
    patched.patches_uuid = uuid.uuid4()
    patched.set_attachments(PROJECTIONS, earlier)


def _put_under(patched: Any, key: str, value: Any) -> Any:
    """Move the patch that holds `value` below all LoRAs of its parameter, and return it.

    It stays above merges: those made the model that it changes, and scale all that lies below them.
    """
    entry = next(each for each in patched.patches[key] if each[1] is value)
    others = [each for each in patched.patches[key] if each is not entry]
    below = max((i + 1 for i, each in enumerate(others) if _is_merge(each)), default=0)
    patched.patches[key] = [*others[:below], entry, *others[below:]]
    return entry


def take_away(patched: Any, entries: Iterable[tuple[str, Any]]) -> None:
    """Remove patches of ours, by identity, from a clone."""
    for key, entry in entries:
        left = [each for each in patched.patches.get(key, []) if each is not entry]
        if left:
            patched.patches[key] = left
        else:
            patched.patches.pop(key, None)


def replace_deltas(
    patched: Any,
    weights: Mapping[str, Sequence[str]],
    sites: Mapping[str, SiteSettings],
    deltas: Mapping[str, Tensor],
) -> None:
    """Put a student's weight deltas on a clone through ComfyUI's own LoRA loader, under every LoRA.

    A delta of an earlier student is taken away first if `sites` names each site whose attention it is part of. Those
    that are part of none, such as of an MLP, go with the last site that the student was trained for.

    Args:
        weights: by site, the paths of the modules with the weights of its attention.
        sites: what the node runs.
        deltas: by LoRA key.

    Raises:
        ValueError: a delta belongs to no parameter of this model, or has another shape.
    """
    _take_deltas_away(patched, frozenset(sites))
    if not deltas:
        return
    keys = comfy.lora.model_lora_keys_unet(patched.model, {})
    names = patched.model_state_dict().keys()
    for name, tensor in deltas.items():
        found = DELTA_SUFFIX.search(name)
        key = keys.get(name[: found.start()]) if found else None
        if found and found[1] == "diff_b" and key is not None:
            key = key.removesuffix(".weight") + ".bias"
        if found is None or key is None or key not in names:
            raise ValueError(f"the student changes {name}, which this model does not have")
        # the parameter tells the shape of its numbers, the state dict that of packed bytes
        shape = tuple(comfy.utils.get_attr(patched.model, key).shape)
        _check_delta(name, found[1], tuple(tensor.shape), shape)
    loaded = comfy.lora.load_lora(dict(deltas), keys)
    accepted = patched.add_patches(loaded)
    if len(accepted) != len(loaded):
        raise ValueError(f"the student changes {sorted(map(str, set(loaded) - set(accepted)))[0]}, which did not load")
    prefixes = {site: tuple(f"diffusion_model.{path}." for path in paths) for site, paths in weights.items()}
    entries: list[Delta] = []
    for key, value in loaded.items():
        owners = frozenset(site for site, below in prefixes.items() if key.startswith(below))
        entries.append((key, _put_under(patched, key, value), owners))
    trained = frozenset(site for site, settings in sites.items() if settings.trained)
    patched.set_attachments(DELTAS, (trained or frozenset(sites), entries))


def _take_deltas_away(patched: Any, sites: frozenset[str]) -> None:
    trained, earlier = patched.get_attachment(DELTAS) or (frozenset(), ())
    trained, kept = trained - sites, list[Delta]()
    for key, entry, owners in earlier:
        left = owners - sites
        if trained and (left or not owners):
            kept.append((key, entry, left))
        else:
            take_away(patched, [(key, entry)])
    patched.set_attachments(DELTAS, (trained, kept))


def _check_delta(name: str, suffix: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
    fits = {
        "lora_up": found[:1] == needed[:1],
        "lora_B": found[:1] == needed[:1],
        "lora_down": found[1:] == needed[1:],
        "lora_A": found[1:] == needed[1:],
        "diff": found == needed,
        "set_weight": found == needed,
        "diff_b": found == needed,
    }
    if not fits.get(suffix, True):
        raise ValueError(f"the student's {name} has shape {found}, which does not fit this model's {needed}")


def count_merges(patched: Any) -> int:
    """Return how many patches of a model are merges with other models."""
    return sum(_is_merge(each) for patches in patched.patches.values() for each in patches)


def merge_note(patched: Any, trained: Iterable[str]) -> str:
    """Return what merges behind the pack's nodes left of trained sites, in one sentence; empty where there are none.

    ComfyUI merges by scaling the weights of a clone and adding another model's, with the patches of both. So changes of
    weights get weaker, while the clone has the first model's plan and feature maps, whole.
    """
    trained = frozenset(trained)
    if not trained or count_merges(patched) <= (patched.get_attachment(MERGES) or 0):
        return ""
    placed = patched.get_attachment(PROJECTIONS) or {}
    _, deltas = patched.get_attachment(DELTAS) or (frozenset(), ())
    entries = [entry for site in trained for entry in placed.get(site, ())]
    entries += [(key, entry) for key, entry, owners in deltas if owners & trained or not owners]
    left = sorted({round(_strength(entry, patched.patches.get(key, ())), 2) for key, entry in entries})
    if left in ([], [1.0]):
        return "another node merged weights into this model that were not trained for its attention"
    shares = " to ".join(f"{share:.0%}" for share in dict.fromkeys((left[0], left[-1])))
    return (
        f"another node merged this model with another: its trained changes of weights count {shares}, while its plan "
        "and feature maps run whole"
    )


def _is_merge(entry: Any) -> bool:
    strength, value, kept = entry[:3]
    return kept != 1.0 or (isinstance(value, list) and strength != 0.0)


def _strength(requested: Any, patches: Iterable[Any]) -> float:
    """Return how much of a patch is in what a list of patches computes, those of merged models included."""
    found = 0.0
    for each in patches:
        strength, value, kept = each[:3]
        found *= kept
        if _are_equal(each, requested):
            found += strength
        elif isinstance(value, list):
            found += strength * _strength(requested, value[1:])
    return found


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two patches change the same rows alike; two nodes may have read one file."""
    if one is other:
        return True
    mine, theirs = _tensors(one[1]), _tensors(other[1])
    return (
        one[3] == other[3]
        and [each.shape for each in mine] == [each.shape for each in theirs]
        and len(mine) > 0
        and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return _tensors(tuple(getattr(value, "weights", None) or ()))
