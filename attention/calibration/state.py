"""A calibration that was interrupted, in one safetensors file: the latent, and all that was seen so far."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..spec_json import spec_from_json, spec_to_json
from ..specs import HeadSplit, Spec
from ..students.tensor_file import open_tensor_file, write_tensor_file
from .file import layout_from_json, layout_to_json
from .watch import Seen, ShapeKey, TimedShape

FORMAT = "linearize/calibrating/1"
Point = tuple[Tensor, Tensor, Tensor]  # latent, noise level, what the dense model makes of them


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Where a calibration stands.

    Args:
        done: steps.
        step_seconds: of a dense step.
        spent: seconds that all of it took so far.
        latent: of the next step.
        points: by step, where plans are compared with the dense model.
        seen: by the watch.
    """

    done: int
    step_seconds: float
    spent: float
    latent: Tensor
    points: Mapping[int, Point]
    seen: Seen


def write_state(path: Path, state: State) -> None:
    """Keep a state.

    Raises:
        ValueError: the disk refuses, or a latent is not finite. OSError: there can be no folder.
    """
    tensors = {"latent": state.latent}
    for step, point in state.points.items():
        tensors |= {f"{step}.{name}": tensor for name, tensor in zip(("latent", "sigma", "dense"), point, strict=True)}
    facts = {name: getattr(state, name) for name in ("done", "step_seconds", "spent")} | {"seen": _to_json(state.seen)}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensor_file(path, kept, {"format": FORMAT, "state": json.dumps(facts)})


def read_state(path: Path, like: Tensor) -> State | None:
    """Return a state that was kept for a latent of this shape, on its device; None where there is none to read."""
    try:
        if not path.is_file():
            return None
        file = open_tensor_file(path)
        if file.metadata.get("format") != FORMAT:
            return None
        facts = json.loads(file.metadata["state"])
        tensors = {name: tensor.to(like.device) for name, tensor in file.load(file.tensors).items()}
        steps = sorted({int(name.split(".")[0]) for name in tensors if name != "latent"})
        points = {step: _point(tensors, step) for step in steps}
        if tensors["latent"].shape != like.shape:
            return None
        numbers = int(facts["done"]), float(facts["step_seconds"]), float(facts["spent"])
        return State(*numbers, tensors["latent"], points, _seen(facts["seen"]))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None  # nothing is lost but the steps


def _point(tensors: Mapping[str, Tensor], step: int) -> Point:
    return tensors[f"{step}.latent"], tensors[f"{step}.sigma"], tensors[f"{step}.dense"]


def _to_json(seen: Seen) -> dict[str, Any]:
    specs = list(dict.fromkeys(spec for shape in seen.shapes.values() for spec in shape.seconds))
    keys = list(seen.shapes)
    return {
        "steps": seen.steps,
        "stride": seen.stride,
        "calls": dict(seen.calls),
        "reasons": seen.reasons,
        "specs": list(map(spec_to_json, specs)),
        "shapes": [
            [list(key.shape), layout_to_json(key.layout), key.dtype, shape.dense,
             [[specs.index(spec), seconds] for spec, seconds in shape.seconds.items()]]
            for key, shape in seen.shapes.items()
        ],
        "shape_of": {site: keys.index(key) for site, key in seen.shape_of.items()},
        "sums": {
            site: [[specs.index(spec), *sums] for spec, sums in own.items()] for site, own in seen.sums.items()
        },
    }  # fmt: skip


def _seen(data: Mapping[str, Any]) -> Seen:
    specs = [_whole(spec_from_json(each)) for each in data["specs"]]
    shapes = {
        ShapeKey(tuple(shape), layout_from_json(layout), str(dtype)): TimedShape(
            float(dense), {specs[number]: float(each) for number, each in seconds}
        )
        for shape, layout, dtype, dense, seconds in data["shapes"]
    }
    keys = list(shapes)
    return Seen(
        int(data["steps"]),
        Counter(data["calls"]),
        dict(data["reasons"]),
        shapes,
        {site: keys[number] for site, number in data["shape_of"].items()},
        {
            site: {specs[number]: (float(missed), float(whole)) for number, missed, whole in own}
            for site, own in data["sums"].items()
        },
        int(data["stride"]),
    )


def _whole(spec: Any) -> Spec:
    if isinstance(spec, HeadSplit):
        raise ValueError("a candidate is one spec for all heads")
    return spec
