"""The report of a plan's costs: the rows, and every number of the text."""

from types import SimpleNamespace

import pytest

from linearize.attention import ClearSpec, DenseSpec, HybridSpec, LinearSpec, Segment, TokenLayout, grid_segment
from linearize.attention.hosts import Site
from linearize.attention.planning.report import describe_costs, describe_spec, site_costs
from linearize.attention.specs import ChunkedSpec, radius_per_head

LAYOUT = TokenLayout.of((Segment("text", 512), grid_segment("main", 1, 64, 64)))
SITES = ("double.0", "single.0", "single.1")
DENSE_PAIRS = 24 * 4608**2
ALONE = 24 * (512 * 4608 + 4096 * (512 + 1))  # at radius 1 a grid token sees the text and itself


def host(num_heads=24, head_dim=128, sites=SITES):
    return SimpleNamespace(
        sites=lambda module: tuple(Site(site, num_heads, head_dim) for site in sites),
        site_layout=lambda site, layout: layout,
    )


def test_a_row_for_every_site_dense_where_nothing_is_planned():
    rows = site_costs(host(), None, {"single.0": ClearSpec(1)}, LAYOUT)
    assert [row.site.id for row in rows] == list(SITES)
    assert [row.spec for row in rows] == [DenseSpec(), ClearSpec(1), DenseSpec()]
    assert [row.dense.pairs for row in rows] == [DENSE_PAIRS] * 3
    assert [row.planned.pairs for row in rows] == [DENSE_PAIRS, ALONE, DENSE_PAIRS]


def test_matrices_count_at_the_sites_that_are_planned():
    specs = {"single.0": ClearSpec(1), "single.1": ClearSpec(1)}
    rows = site_costs(host(), None, specs, LAYOUT, with_matrices=("single.0", "double.0"))
    assert rows[1].planned.flops - rows[2].planned.flops == 24 * 4096 * 2 * 128**2
    assert rows[0].planned == rows[0].dense


def test_the_text_of_a_plan():
    rows = site_costs(host(), None, {"single.0": ClearSpec(1), "single.1": ClearSpec(1)}, LAYOUT)
    assert describe_costs("Test", "1024 x 1024", LAYOUT, rows).split("\n") == [
        "Test, 1024 x 1024: 4,608 tokens (512 global), 3 sites: double.0, single.0-1",
        "dense: 1 site (double.0)",
        "clear radius 1: 2 sites (single.0-1)",
        "attention per forward: 782.8 GFLOP dense, 370.5 GFLOP as planned (47.3%)",
        "q, k, v and output of one site in 16 bits: 108 MiB",
    ]


@pytest.mark.parametrize(
    ("cells", "num_heads", "head_dim", "flops"),
    [(1, 1, 1, "0.0 MFLOP"), (5, 24, 128, "7.7 MFLOP"), (9, 24, 128, "80.6 MFLOP"), (19, 24, 128, "1.6 GFLOP"),
     (128, 24, 128, "3.3 TFLOP")],
)  # fmt: skip
def test_flops_are_told_in_the_unit_that_fits(cells, num_heads, head_dim, flops):
    layout = TokenLayout.of((grid_segment("main", 1, cells, cells),))
    rows = site_costs(host(num_heads, head_dim, SITES[:1]), None, {}, layout)
    assert f"{flops} dense, {flops} as planned (100.0%)" in describe_costs("Test", "small", layout, rows)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DenseSpec(), "dense"),
        (ClearSpec(), "clear radius 16"),
        (ClearSpec(8, 2, 4, True), "clear radius 8 temporal_radius 2 down_factor 4 proportional True"),
        (LinearSpec(), "linear"),
        (HybridSpec(3, "favor"), "hybrid rate 3 feature_map favor"),
        (ChunkedSpec(causal=True), "chunked chunk_frames 3 causal True"),
        (radius_per_head((8, 16, 16)), "1 heads clear radius 8 + 2 heads clear radius 16"),
    ],
)
def test_a_spec_is_told_by_its_size_and_by_what_differs_from_the_defaults(spec, words):
    assert describe_spec(spec) == words
