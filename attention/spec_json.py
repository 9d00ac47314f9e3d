"""Specs in plain form, as plans, files and people write them: `{kind, parameter: value}`."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from .shown import quote, quote_some
from .specs import MOST_HEADS, SPECS, HeadGroup, HeadSplit, SiteSpec


def spec_to_json(spec: SiteSpec) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the plain form of a spec: `{kind, parameter: value}`, or for a split a list of `{heads, spec}`."""
    if isinstance(spec, HeadSplit):
        return [{"heads": list(group.heads), "spec": spec_to_json(group.spec)} for group in spec.groups]
    return {"kind": spec.kind, **asdict(spec)}


def spec_from_json(data: object) -> SiteSpec:
    """Return the spec that `spec_to_json` wrote or a person typed; parameters left out take their defaults.

    Raises:
        ValueError: unknown kind or parameter (named), or a value out of range.
    """
    if isinstance(data, list):
        if len(data) > MOST_HEADS:
            raise ValueError(f"a site has at most {MOST_HEADS} heads, got {len(data)} groups")
        return HeadSplit(tuple(_group_from_json(entry) for entry in data))
    if not isinstance(data, Mapping):
        raise ValueError(f"a spec is an object with a kind, or a list of heads and specs, got {quote(data)}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in SPECS:
        raise ValueError(f"kind is one of {', '.join(SPECS)}, got {quote(kind)}")
    known = {field.name for field in fields(SPECS[kind])}
    unknown = sorted(set(data) - known - {"kind"})
    if unknown:
        allowed = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
        raise ValueError(f"kind {kind} has no parameter {quote_some(unknown)}; {allowed}")
    return SPECS[kind](**{name: value for name, value in data.items() if name != "kind"})


def _group_from_json(entry: object) -> HeadGroup:
    if not isinstance(entry, Mapping) or set(entry) != {"heads", "spec"}:
        raise ValueError(f"a group of heads is an object with heads and spec, got {quote(entry)}")
    if isinstance(entry["spec"], list):
        raise ValueError("a group of heads has one spec, not a list of groups")
    heads, spec = entry["heads"], spec_from_json(entry["spec"])
    if not isinstance(heads, list) or not all(type(head) is int for head in heads):
        raise ValueError(f"heads is a list of whole numbers, got {quote(heads)}")
    assert not isinstance(spec, HeadSplit)
    return HeadGroup(tuple(heads), spec)
