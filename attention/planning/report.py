"""What a plan costs at a size, as rows and as text, before anything runs."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..hosts import Host, Site
from ..layout import TokenLayout
from ..plans import describe_sites, group_sites
from ..specs import DenseSpec, HeadSplit, SiteSpec
from ..words import counted
from .cost import Cost, attention_cost

PLANNED = 512  # pixels a side of a picture that tells how many pixels a token has


@dataclass(frozen=True, slots=True)
class SiteCost:
    """One site with its spec, and its cost as dense attention and as planned."""

    site: Site
    spec: SiteSpec
    dense: Cost
    planned: Cost


def site_costs(
    host: Host,
    module: Any,
    specs: Mapping[str, SiteSpec],
    layout: TokenLayout,
    with_matrices: Collection[str] = (),
) -> tuple[SiteCost, ...]:
    """Return the cost of every site of a model; sites that `specs` does not name are dense.

    Args:
        with_matrices: sites that have a matrix per head behind their attention, see `output_map.py`.
    """
    rows = []
    for site in host.sites(module):
        spec, own = specs.get(site.id, DenseSpec()), host.site_layout(site.id, layout)
        dense = attention_cost(DenseSpec(), own, site.num_heads, site.head_dim)
        has_matrices = site.id in with_matrices and site.id in specs
        planned = attention_cost(spec, own, site.num_heads, site.head_dim, has_matrices=has_matrices)
        rows.append(SiteCost(site, spec, dense, planned))
    return tuple(rows)


def describe_spec(spec: SiteSpec) -> str:
    """Return a spec in a few words: its kind, and the parameters that differ from the defaults."""
    if isinstance(spec, HeadSplit):
        return " + ".join(f"{len(group.heads)} heads {describe_spec(group.spec)}" for group in spec.groups)
    default = asdict(type(spec)())
    words = [f"{name} {value}" for name, value in asdict(spec).items() if name in spec.told or value != default[name]]
    return " ".join([spec.kind, *words])


def describe_specs(specs: Mapping[str, SiteSpec]) -> list[str]:
    """Return a line per spec: what it is, and how many and which sites run it."""
    counts = Counter(specs.values())
    return [
        f"{describe_spec(spec)}: {counted(counts[spec], 'site')} ({expression})"
        for expression, spec in group_sites(specs)
    ]


def describe_costs(title: str, size: str, layout: TokenLayout, rows: Sequence[SiteCost]) -> str:
    """Return the report as text: tokens, what runs where, FLOPs per forward and the least memory traffic."""
    dense, planned = (sum(getattr(row, name).flops for row in rows) for name in ("dense", "planned"))
    lines = [
        f"{title}, {size}: {layout.num_tokens:,} tokens ({layout.num_global:,} global),"
        f" {len(rows)} sites: {describe_sites([row.site.id for row in rows])}",
        *describe_specs({row.site.id: row.spec for row in rows}),
        f"attention per forward: {_flops(dense)} dense, {_flops(planned)} as planned ({planned / dense:.1%})",
        f"q, k, v and output of one site in 16 bits: {rows[0].dense.moved_bytes / 2**20:,.0f} MiB",
    ]
    return "\n".join(lines)


def describe_sampled(host: Host, module: Any, layouts: Collection[TokenLayout]) -> str:
    """Return what a run was given, size by size: pixels, tokens of the picture and of all that is global."""
    planned = host.planned_layout(module, PLANNED, PLANNED, 1, 0).grids
    side = PLANNED // planned[0][1][2] if planned else 0
    return "; ".join(sorted({_sampled(layout, side) for layout in layouts}))


def _sampled(layout: TokenLayout, side: int) -> str:
    grids = [grid for _, grid in layout.grids]
    if not grids:
        return f"{layout.num_tokens:,} tokens"
    frames, rows, columns = max(grids, key=math.prod)
    pixels = f"{columns * side} x {rows * side} pixels" if side else f"{columns} x {rows} tokens"
    clip = f", {counted(frames, 'latent frame')}" if frames > 1 else ""
    more = f", {counted(len(grids) - 1, 'reference')}" if len(grids) > 1 else ""
    return f"{pixels}{clip}{more}, {counted(layout.num_global, 'text token')}"


def _flops(count: int) -> str:
    for unit, size in (("TFLOP", 10**12), ("GFLOP", 10**9)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 10**6:,.1f} MFLOP"
