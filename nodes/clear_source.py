"""Which weights the CLEAR node uses: none, a file, or the published one, and what it says about them.

A file that the user chose is used wherever it fits; `auto` only where the model's own weights are those it began as.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attention.hosts import Host
from ..attention.kinds.kind import Learned
from ..attention.runtime.record import once
from ..attention.shown import one_line
from ..attention.specs import ClearSpec
from ..attention.students.clear_weights import SAME_BASE, ClearWeights, clear_weights, published_radius
from ..attention.students.learned import StudentParameters
from ..attention.students.tensor_file import MAX_NAME, FileProblem, open_tensor_file
from . import model_files

AUTO, NONE = "auto", "none"
POOLED_UNTRAINED = (
    "pooled keys count near tokens twice, and a far square as one token; weights distilled for them mend that, and "
    "there are none here: Foveated Attention counts every token once, so put that node in this one's place"
)
PUBLISHED_HOST, PUBLISHED_WIDTH, PUBLISHED_DEPTH = "flux", 3072, (19, 38)  # FLUX.1-dev, double and single blocks


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


def clear_source(
    choice: str, spec: ClearSpec, host: Host, module: Any, read: Callable[[str], Tensor] | None = None
) -> ClearSource:
    """Return the weights for a choice.

    Args:
        choice: `auto`, `none` or a file's name; a published file that is not there is downloaded.
        spec: what the node asks for.
        host, module: the model that receives them.
        read: returns a parameter of that model without patches; without it `auto` takes no weights.

    Raises:
        ValueError: a chosen file is not there, cannot be read, or does not fit the model or the spec.
    """
    if choice == NONE:
        return _untrained(spec)
    if choice == AUTO:
        return _automatic(spec, host, module, read)
    if choice in model_files.published_files() and model_files.find(choice) is None:
        _check_before_download(choice, spec, host, module)
    weights = clear_weights(open_tensor_file(model_files.fetch(choice)), host, module)
    if spec.down_factor not in (1, weights.down_factor):
        raise ValueError(
            f"{choice} was distilled with down_factor {weights.down_factor}, the node says {spec.down_factor}; set it"
            f" to {weights.down_factor}, or to 1 to take the file's"
        )
    notes = [f"weights: {one_line(choice, MAX_NAME)}"]
    if weights.radius is not None and weights.radius != spec.radius:
        notes.append(f"these weights were distilled for radius {weights.radius}, the node runs radius {spec.radius}")
    if weights.ignored:
        example = one_line(weights.ignored[0])
        notes.append(f"{len(weights.ignored)} other tensors in the file were ignored, such as {example}")
    return ClearSource(replace(spec, down_factor=weights.down_factor), weights, tuple(notes))


def read_weights(weights: ClearWeights | None, sites: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the weights of `sites` as `patch_model` takes them, and the name of the file with its sha256, if known."""
    if weights is None:
        return {}, ""

    def read(_: Path) -> dict[str, Any]:
        return {
            "projections": weights.projections(sites),
            "parameters": StudentParameters({s: Learned(pool) for s, pool in weights.pool_weights(sites).items()}),
        }

    return model_files.read_identified(weights.file.path, read)


def published_name(radius: int, down_factor: int) -> str:
    """Return the name of the published file for these, empty if nobody publishes one."""
    names = model_files.published_files()
    return next((name for name in names if published_radius(name) == (radius, down_factor)), "")


def _automatic(spec: ClearSpec, host: Host, module: Any, read: Callable[[str], Tensor] | None) -> ClearSource:
    name = published_name(spec.radius, spec.down_factor)
    reason = _why_not_offered(name, spec, host, module)
    if not reason:
        try:
            source = clear_source(name, spec, host, module)
            reason = _why_not_taken(name, source, spec, host, module, read)
            if not reason:
                return source
        except (FileProblem, ValueError) as problem:
            reason = str(problem)
    return _untrained(spec, reason)


def _untrained(spec: ClearSpec, reason: str = "") -> ClearSource:
    why = [f"untrained: {reason}"] if reason else []
    return ClearSource(spec, None, (*why, *[POOLED_UNTRAINED] * (spec.down_factor > 1)))


def _why_not_offered(name: str, spec: ClearSpec, host: Host, module: Any) -> str:
    """Return why `auto` does not open a published file, empty if it does."""
    if not name or host.name != PUBLISHED_HOST:
        pooled = f" and down_factor {spec.down_factor}" if spec.down_factor > 1 else ""
        return f"nobody publishes weights for {host.title} with radius {spec.radius}{pooled}"
    if getattr(module, "in_channels", 0) != getattr(module, "out_channels", 0):
        return f"{name} was made for FLUX.1-dev, and this model takes more than a latent, as Fill and Canny do"
    if model_files.find(name) is not None:
        return ""
    other = _another_shape(host, module)
    if other:
        return f"{name} was made for {other}"
    return (
        f"{name} was made for FLUX.1-dev; if this model is FLUX.1-dev or schnell, choose the file under weights to "
        "download it"
    )


def _why_not_taken(
    name: str, source: ClearSource, spec: ClearSpec, host: Host, module: Any, read: Callable[[str], Tensor] | None
) -> str:
    """Return why `auto` does not take a file that fits by its shapes, empty if it does."""
    weights, num_sites = source.weights, len(host.diffusers_sites(module))
    assert weights is not None
    if weights.down_factor != spec.down_factor:
        return f"{name} holds pooling weights for down_factor {weights.down_factor}"
    if weights.num_sites != num_sites:
        return f"{name} belongs to another model: it has {weights.num_sites} sites, this one has {num_sites}"
    apart = _distance(weights, read)
    if apart < SAME_BASE:
        return ""
    found = f"are {apart:.0%} away from it" if math.isfinite(apart) else "cannot be compared with it"
    return (
        f"{name} was made for FLUX.1-dev, and this model's own projections {found}; to use it all the same, choose the "
        "file under weights"
    )


def _distance(weights: ClearWeights, read: Callable[[str], Tensor] | None) -> float:
    """Return how far a model is from what a file began as, infinite where its weights cannot be read."""
    try:
        return weights.distance(read) if read else math.inf
    except FileProblem:
        raise
    except Exception as error:  # packs store weights in forms of their own
        once.info(f"Linearize: weights cannot be read: {type(error).__name__}: {error}")
        return math.inf


def _another_shape(host: Host, module: Any) -> str:
    """Return what the published files were made for and what this model is instead, empty if its shape is theirs."""
    widths = {target.shape[0] for target in host.diffusers_targets(module).values()}
    depth = len(module.double_blocks), len(module.single_blocks)
    if widths == {PUBLISHED_WIDTH} and depth == PUBLISHED_DEPTH:
        return ""
    expected, found = (f"{double} + {single} blocks" for double, single in (PUBLISHED_DEPTH, depth))
    return (
        f"FLUX.1-dev, {PUBLISHED_WIDTH} wide with {expected}; this model is {', '.join(map(str, sorted(widths)))} wide "
        f"with {found}"
    )


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
    other = _another_shape(host, module)
    if other:
        raise ValueError(f"{choice} was made for {other}; choose weights {NONE}")
