"""What was measured of a model, remembered: JSON of format `linearize/calibration/1`, one file a model and machine.

`{format, machine: {fact: value}, sizes: {size: calibration}}`. Nothing here knows ComfyUI's folders.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic_file import whole_file
from ..layout import Segment, TokenLayout
from ..spec_json import spec_from_json, spec_to_json
from ..specs import SiteSpec
from .choice import Choice, Target
from .measures import Checked, Measure, SiteMeasures, attention_seconds, measured_sites

FORMAT = "linearize/calibration/1"
MOST_SIZES, MOST_CHOICES, MOST_BYTES = 24, 8, 8 * 2**20


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured at one size, and what was chosen from it.

    Args:
        latent: shape of the latent without its batch.
        steps: of the sampling that was watched.
        step_seconds: of a dense step.
        spent: seconds that all of it took.
        at: when, seconds since 1970.
        sites: what was measured.
        weights: by site, what its error counts, as `Choice` has them.
        choices: by target, what each site runs and what the whole model gave.
    """

    latent: tuple[int, ...]
    steps: int
    step_seconds: float
    spent: float
    at: float
    sites: tuple[SiteMeasures, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[Target, tuple[Mapping[str, SiteSpec], Checked | None]] = field(default_factory=dict)

    def choice(self, target: Target) -> Choice | None:
        """Return what was chosen for a target, None where nothing was."""
        found = self.choices.get(target)
        if found is None:
            return None
        specs, checked = found
        errors = {each.site: {one.spec: one.error for one in each.measures} for each in self.sites}
        predicted = math.fsum(self.weights.get(site, 1.0) * errors[site][spec] for site, spec in specs.items())
        planned, dense = attention_seconds(measured_sites(self.sites, specs, ""))
        is_within = target.goal == "error" or planned <= dense * target.value * (1 + 1e-6)
        return Choice(specs, self.weights, predicted, checked, is_within=is_within)


def file_name(host: str, machine: Mapping[str, Any]) -> str:
    """Return the name of the file of a model on a machine."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return f"{host}-{digest[:12]}.json"


def read_calibrations(path: Path, machine: Mapping[str, Any]) -> dict[str, Calibration]:
    """Return what a file holds by size; one that is not there, is damaged or of another machine holds nothing."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT or stored["machine"] != machine:
            return {}
        return {str(size): _from_json(data) for size, data in stored["sizes"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return {}


def write_calibration(path: Path, machine: Mapping[str, Any], size: str, calibration: Calibration) -> None:
    """Put a calibration into a file, beside those of other sizes; the oldest go where there are too many.

    Raises:
        OSError: the disk refuses.
    """
    sizes = {**read_calibrations(path, machine), size: calibration}
    newest = sorted(sizes, key=lambda name: sizes[name].at)[-MOST_SIZES:]
    data = {
        "format": FORMAT,
        "machine": dict(machine),
        "sizes": {name: _to_json(each) for name, each in sizes.items() if name in newest},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(data, allow_nan=False).encode())


def sites_to_json(sites: Sequence[SiteMeasures]) -> dict[str, Any]:
    """Return measures in plain form; layouts and specs, which many sites share, stand in lists."""
    layouts = list(dict.fromkeys(each.layout for each in sites if each.layout is not None))
    specs = list(dict.fromkeys(one.spec for each in sites for one in each.measures))
    return {
        "layouts": list(map(layout_to_json, layouts)),
        "specs": list(map(spec_to_json, specs)),
        "sites": {
            each.site: {
                "calls": each.calls,
                "dense_seconds": each.dense_seconds,
                "heads": [each.num_heads, each.head_dim],
                "layout": None if each.layout is None else layouts.index(each.layout),
                "reason": each.reason,
                "measures": [
                    [specs.index(one.spec), one.seconds, one.error if math.isfinite(one.error) else None]
                    for one in each.measures
                ],
            }
            for each in sites
        },
    }


def sites_from_json(data: Mapping[str, Any]) -> tuple[SiteMeasures, ...]:
    """Return the measures that `sites_to_json` wrote.

    Raises:
        ValueError, TypeError, KeyError, IndexError: it wrote something else.
    """
    layouts = list(map(layout_from_json, data["layouts"]))
    specs = list(map(spec_from_json, data["specs"]))
    return tuple(
        SiteMeasures(
            str(site),
            _number(each["calls"]),
            _number(each["dense_seconds"]),
            tuple(
                Measure(specs[spec], _number(seconds), math.nan if error is None else _number(error))
                for spec, seconds, error in each["measures"]
            ),
            None if each["layout"] is None else layouts[each["layout"]],
            int(each["heads"][0]),
            int(each["heads"][1]),
            str(each["reason"]),
        )
        for site, each in data["sites"].items()
    )


def layout_to_json(layout: TokenLayout) -> list[list[Any]]:
    """Return a layout in plain form: role, length, grid and place of each segment."""
    return [[each.role, each.length, each.grid, each.place] for each in layout.segments]


def layout_from_json(data: Sequence[Any]) -> TokenLayout:
    """Return the layout that `layout_to_json` wrote; errors as `sites_from_json`."""
    return TokenLayout(tuple(map(_segment, data)))


def _segment(data: Sequence[Any]) -> Segment:
    role, length, grid, place = data
    return Segment(str(role), int(length), grid and _shape(grid), place and _shape(place))  # pyright: ignore[reportArgumentType]


def _shape(data: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(int, data))


def _number(value: Any) -> float:
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"a measure is 0 or more, got {number}")
    return number


def _to_json(calibration: Calibration) -> dict[str, Any]:
    choices = [
        {
            "goal": target.goal,
            "value": target.value,
            "sites": {site: spec_to_json(spec) for site, spec in specs.items()},
            "error": checked and checked.error,
            "seconds": checked and checked.seconds,
        }
        for target, (specs, checked) in list(calibration.choices.items())[-MOST_CHOICES:]
    ]
    facts = {name: getattr(calibration, name) for name in ("steps", "step_seconds", "spent", "at")}
    return {
        "latent": list(calibration.latent),
        **facts,
        **sites_to_json(calibration.sites),
        "weights": dict(calibration.weights),
        "choices": choices,
    }


def _from_json(data: Mapping[str, Any]) -> Calibration:
    sites = sites_from_json(data)
    known = {each.site: {one.spec for one in each.measures} for each in sites}
    choices = {}
    for each in data["choices"]:
        specs = {str(site): spec_from_json(spec) for site, spec in each["sites"].items()}
        if any(spec not in known[site] for site, spec in specs.items()):
            raise ValueError("a choice names what was not measured")
        checked = None if each["error"] is None else Checked(_number(each["error"]), _number(each["seconds"]))
        choices[Target(each["goal"], each["value"])] = (specs, checked)
    return Calibration(
        _shape(data["latent"]),
        int(data["steps"]),
        _number(data["step_seconds"]),
        _number(data["spent"]),
        _number(data["at"]),
        sites,
        {str(site): _number(weight) for site, weight in data["weights"].items()},
        choices,
    )
