"""Plans: which spec each site of a host runs, with site expressions and the JSON form `linearize/plan/1`.

A plan is data; `attention/runtime/run_site.py` acts on it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .checks import parse_json
from .shown import one_line, quote, quote_some
from .spec_json import spec_from_json, spec_to_json
from .specs import DenseSpec, SiteSpec

PLAN_FORMAT = "linearize/plan/1"
PART = re.compile(r"(?P<group>[a-z][a-z0-9_]*)(?:\.(?P<first>[0-9]{1,6})(?:-(?P<last>[0-9]{1,6}))?)?")
MOST_PARTS = 4096  # of all expressions of a plan together; no model has so many sites
MOST_HOST = 100  # characters of a host's name
ANY_HOST = "auto"  # as a plan's host: whichever the model has that it meets


def select_sites(expression: str, sites: Sequence[str]) -> tuple[str, ...]:
    """Return the sites that an expression names, in the host's order.

    Args:
        expression: parts with commas or spaces between them, in any case; a part is `all`, a group (`double`), a site
            (`single.10`) or a range with both ends included (`single.10-37`).
        sites: the host's site ids.

    Raises:
        ValueError: a part cannot be read or names no site; the sentence says which groups there are.
    """
    chosen: set[str] = set()
    for part, match in read_expression(expression):
        found = {site for site in sites if part == "all" or _names(match, site)}
        if not found:
            raise ValueError(f"{quote(part)} names no site of this model, which has {describe_sites(sites)}")
        chosen |= found
    return tuple(site for site in sites if site in chosen)


def read_expression(expression: str) -> list[tuple[str, re.Match[str]]]:
    """Return the parts of a site expression, each as text and as read.

    Raises:
        ValueError: one cannot be read.
    """
    _check_parts([expression])
    parts = _parts(expression)
    found = [(part, PART.fullmatch(part)) for part in parts]
    wrong = [part for part, match in found if match is None]
    if wrong:
        raise ValueError(
            f"cannot read {quote(wrong[0])} in sites {quote(expression)}; write for example all, double or single.10-37"
        )
    return [(part, match) for part, match in found if match is not None]


def _parts(expression: str) -> list[str]:
    """Return the parts of a site expression; commas count, so that an empty part is seen."""
    return [each for part in re.split("[,，]", expression.lower()) for each in (part.split() or [""])]


def _check_parts(expressions: Iterable[str]) -> None:
    parts = sum(len(_parts(expression)) for expression in expressions)
    if parts > MOST_PARTS:
        raise ValueError(f"sites are named in at most {MOST_PARTS} parts, got {parts}; write ranges, as in single.0-37")


def _names(match: re.Match[str], site: str) -> bool:
    group, _, number = site.rpartition(".")
    if match["group"] != group:
        return False
    if match["first"] is None:
        return True
    return int(match["first"]) <= int(number) <= int(match["last"] or match["first"])


def describe_sites(sites: Sequence[str]) -> str:
    """Return site ids in the short form of expressions, for example `double.0-18, single.0-37`."""
    groups = list(dict.fromkeys(site.rpartition(".")[0] for site in sites))
    sites = sorted(sites, key=lambda site: groups.index(site.rpartition(".")[0]))  # of Wan, two groups alternate
    parts, start = [], 0
    for stop in range(1, len(sites) + 1):
        group, _, first = sites[start].rpartition(".")
        following = f"{group}.{int(first) + stop - start}"
        if stop < len(sites) and sites[stop] == following:
            continue
        parts.append(f"{group}.{first}" if stop == start + 1 else f"{group}.{first}-{int(first) + stop - start - 1}")
        start = stop
    return ", ".join(parts)


def group_sites(specs: Mapping[str, SiteSpec]) -> tuple[tuple[str, SiteSpec], ...]:
    """Return (site expression, spec) pairs for specs given site by site, equal specs in one pair."""
    distinct: list[SiteSpec] = []
    for spec in specs.values():
        if spec not in distinct:
            distinct.append(spec)
    named = ((describe_sites([site for site in specs if specs[site] == spec]), spec) for spec in distinct)
    return tuple((expression.replace(" ", ""), spec) for expression, spec in named)


@dataclass(frozen=True, slots=True)
class SiteMeasured:
    """What was measured of the spec that a site runs.

    Args:
        seconds, dense_seconds: of its attention calls in one step.
        error: energy of what its output misses over the energy of the dense output.
        where: when, on what and at which size, in words.
    """

    seconds: float
    dense_seconds: float
    error: float
    where: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The spec of every site of one host.

    Args:
        host: the architecture it was written for, such as "flux", or ANY_HOST.
        default: the spec of sites that no rule names.
        rules: (site expression, spec) pairs; where two name the same site, the later one holds.
        measured: by site, what this machine measured of its spec; no part of the JSON form.
    """

    host: str
    default: SiteSpec = DenseSpec()
    rules: tuple[tuple[str, SiteSpec], ...] = ()
    measured: Mapping[str, SiteMeasured] = field(default_factory=dict, compare=False)

    @classmethod
    def of_sites(cls, host: str, specs: Mapping[str, SiteSpec]) -> "Plan":
        """Return the plan that gives each site its spec; sites that are not named stay dense."""
        return cls(host, rules=group_sites(specs))

    def for_host(self, name: str, title: str) -> "Plan":
        """Return the plan as that of a model's host.

        Args:
            name, title: of the host.

        Raises:
            ValueError: it was written for another one.
        """
        if self.host not in (name, ANY_HOST):
            raise ValueError(f"the plan is for host {one_line(self.host)}, this model is {name} ({title})")
        return replace(self, host=name)

    def resolve(self, sites: Sequence[str]) -> dict[str, SiteSpec]:
        """Return the spec of each of `sites`.

        Raises:
            ValueError: a rule cannot be read or names no site, so that it was made for another model.
        """
        specs = dict.fromkeys(sites, self.default)
        for expression, spec in self.rules:
            specs.update(dict.fromkeys(select_sites(expression, sites), spec))
        return specs

    def spec_of(self, site: str) -> SiteSpec:
        """Return the spec of one site of the host, whatever other sites there are."""
        spec = self.default
        for expression, each in self.rules:
            parts = (PART.fullmatch(part) for part in _parts(expression))
            if any(match and (match[0] == "all" or _names(match, site)) for match in parts):
                spec = each
        return spec

    def to_json(self) -> dict[str, Any]:
        """Return the plain form, a JSON object with format, host, default and sites."""
        sites: dict[str, Any] = {}
        for expression, spec in self.rules:
            sites.pop(expression, None)  # a repeated expression holds from its last place on
            sites[expression] = spec_to_json(spec)
        return {"format": PLAN_FORMAT, "host": self.host, "default": spec_to_json(self.default), "sites": sites}

    @classmethod
    def from_json(cls, data: object) -> "Plan":
        """Return the plan that `to_json` wrote or a person typed; `default` and `sites` may be left out.

        Raises:
            ValueError: another format, an unknown key (named), or a spec that cannot be read (its site is named).
        """
        if not isinstance(data, Mapping) or data.get("format") != PLAN_FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"a plan is a JSON object with format {PLAN_FORMAT!r}, got {quote(found)}")
        unknown = sorted(set(data) - {"format", "host", "default", "sites"})
        if unknown:
            raise ValueError(f"a plan has no key {quote_some(unknown)}; its keys are format, host, default, sites")
        if not isinstance(data.get("host"), str) or not isinstance(data.get("sites", {}), Mapping):
            raise ValueError("a plan names its host as text, and its sites as an object of expression: spec")
        if len(data["host"]) > MOST_HOST:
            raise ValueError(f"host of a plan has at most {MOST_HOST} characters, got {quote(data['host'])}")
        _check_parts(data.get("sites", {}))
        rules = tuple((expression, _named(expression, spec)) for expression, spec in data.get("sites", {}).items())
        return cls(data["host"], _named("default", data.get("default", {"kind": "dense"})), rules)

    @classmethod
    def from_text(cls, text: str) -> "Plan":
        """Return the plan in a JSON text.

        Raises:
            ValueError: as `from_json`, or the text is not JSON (line and column are named).
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"the plan {error}") from None
        return cls.from_json(data)


def _named(where: str, data: object) -> SiteSpec:
    try:
        return spec_from_json(data)
    except ValueError as error:
        raise ValueError(f"in the plan, {one_line(where)}: {error}") from None
