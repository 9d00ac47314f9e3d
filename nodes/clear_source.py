"""Which weights the CLEAR node uses: none, a file, or the published one that fits, and what to tell about it."""

from dataclasses import dataclass, replace
from typing import Any

from ..attention.clear_weights import ClearWeights, clear_weights, published_radius
from ..attention.hosts import Host
from ..attention.specs import ClearSpec
from ..attention.tensor_file import FileProblem, open_tensor_file
from . import model_files

AUTO, NONE = "auto", "none"
PUBLISHED_HOST, PUBLISHED_WIDTH = "flux", 3072  # FLUX.1-dev, and the rows of its projections


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
    if choice in model_files.published_files() and model_files.find(choice) is None:
        _check_before_download(choice, spec, host, module)
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


def published_name(radius: int, down_factor: int) -> str:
    """Return the name of the published file for these, empty if nobody publishes one."""
    names = model_files.published_files()
    return next((name for name in names if published_radius(name) == (radius, down_factor)), "")


def _automatic(spec: ClearSpec, host: Host, module: Any) -> ClearSource:
    name = published_name(spec.radius, spec.down_factor)
    if not name or host.name != PUBLISHED_HOST:
        pooled = f" and down_factor {spec.down_factor}" if spec.down_factor > 1 else ""
        note = f"untrained: nobody publishes weights for {host.title} with radius {spec.radius}{pooled}"
        return ClearSource(spec, None, (note,))
    if model_files.find(name) is None:
        note = f"untrained: {name} would fit; choose it under weights to download it"
        return ClearSource(spec, None, (note,))
    try:
        source = clear_source(name, spec, host, module)
    except (FileProblem, ValueError) as problem:
        return ClearSource(spec, None, (f"untrained: {problem}",))
    if source.spec.down_factor != spec.down_factor:
        return ClearSource(
            spec, None, (f"untrained: {name} holds pooling weights for down_factor {source.spec.down_factor}",)
        )
    return source


def _check_before_download(choice: str, spec: ClearSpec, host: Host, module: Any) -> None:
    """Refuse what is known not to fit before 3.6 GB are fetched."""
    if host.name != PUBLISHED_HOST:
        raise ValueError(f"{choice} was made for FLUX.1-dev, this model is {host.title}; choose weights {NONE}")
    published = published_radius(choice)
    if published is not None and spec.down_factor not in (1, published[1]):
        raise ValueError(
            f"{choice} was distilled with down_factor {published[1]}, the node says {spec.down_factor}; choose the file"
            " that fits, or set down_factor to 1 to take the file's"
        )
    widths = {target.shape[0] for target in host.diffusers_targets(module).values()}
    if widths != {PUBLISHED_WIDTH}:
        raise ValueError(f"{choice} was made for FLUX.1-dev, {PUBLISHED_WIDTH} wide; this model's projections differ")
