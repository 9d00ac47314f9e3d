"""Which weights the CLEAR node uses: none, a file, or the published one that fits, and what to tell about it."""

from dataclasses import dataclass, replace
from typing import Any

from ..attention.clear_weights import ClearWeights, clear_weights, published_radius
from ..attention.hosts import Host
from ..attention.specs import ClearSpec
from ..attention.tensor_file import FileProblem, open_tensor_file
from . import model_files

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class ClearSource:
    """Where the CLEAR node's weights come from.

    Args:
        spec: the node's spec, with the down_factor of the weights.
        weights: None where the model's own are used.
        notes: sentences for the node.
    """

    spec: ClearSpec
    weights: ClearWeights | None
    notes: tuple[str, ...]


def choices() -> list[str]:
    """Return what the weights input offers: local files, and CLEAR's published ones whether there or not."""
    return [AUTO, NONE, *dict.fromkeys([*model_files.local_files(), *model_files.published_files()])]


def clear_source(choice: str, spec: ClearSpec, host: Host, module: Any) -> ClearSource:
    """Return the weights for a choice.

    Args:
        choice: `auto`, `none` or a file's name; a published file that is not there is downloaded.
        spec: what the node asks for.
        host, module: the model that receives them.

    Raises:
        ValueError: a chosen file is not there, cannot be read, or does not fit the model or the spec.
    """
    if choice == NONE:
        return ClearSource(spec, None, ("untrained: the model's own weights",))
    if choice == AUTO:
        return _automatic(spec, host, module)
    weights = clear_weights(open_tensor_file(model_files.fetch(choice)), host, module)
    if spec.down_factor not in (1, weights.down_factor):
        raise ValueError(
            f"{choice} was distilled with down_factor {weights.down_factor}, the node says {spec.down_factor}; set it"
            f" to {weights.down_factor}, or to 1 to take the file's"
        )
    notes = [f"weights: {choice}"]
    if weights.radius is not None and weights.radius != spec.radius:
        notes.append(f"these weights were distilled for radius {weights.radius}, the node runs radius {spec.radius}")
    if weights.ignored:
        notes.append(f"{len(weights.ignored)} other tensors in the file were ignored, such as {weights.ignored[0]}")
    return ClearSource(replace(spec, down_factor=weights.down_factor), weights, tuple(notes))


def _automatic(spec: ClearSpec, host: Host, module: Any) -> ClearSource:
    wanted = (spec.radius, spec.down_factor)
    name = next((name for name in model_files.published_files() if published_radius(name) == wanted), None)
    if name is None or not host.diffusers_targets(module):
        pooled = f" and down_factor {spec.down_factor}" if spec.down_factor > 1 else ""
        note = f"untrained: nobody publishes weights for {host.title} with radius {spec.radius}{pooled}"
        return ClearSource(spec, None, (note,))
    if model_files.find(name) is None:
        note = f"untrained: {name} would fit; choose it under weights to download it"
        return ClearSource(spec, None, (note,))
    try:
        return clear_source(name, spec, host, module)
    except FileProblem as problem:
        return ClearSource(spec, None, (f"untrained: {problem}",))
