"""Specs check themselves and survive JSON."""

import json
import math

import pytest

from linearize.attention.spec_json import spec_from_json, spec_to_json
from linearize.attention.specs import (
    SPECS,
    ChunkedSpec,
    ClearSpec,
    DenseSpec,
    FoveatedSpec,
    HeadGroup,
    HeadSplit,
    HybridSpec,
    LinearSpec,
    groups_of,
    radius_per_head,
)

EXAMPLES = (
    DenseSpec(),
    ClearSpec(8, 3, 4, True),
    FoveatedSpec(2, 0.2, 8, 0, 3, 1),
    LinearSpec("favor", 128),
    HybridSpec(4, "hedgehog", stabilizer="common"),
    HybridSpec(4, "hedgehog", 64, "lse"),
    ChunkedSpec(5, 0, True, "relu"),
    HeadSplit((HeadGroup((0, 2), ClearSpec(4)), HeadGroup((1,), DenseSpec()))),
)


def test_what_heads_of_a_site_learn_is_what_their_specs_agree_on():
    assert ClearSpec(2, down_factor=3).learned_shapes(5) == {"pool": (3, 3)} and not ClearSpec(2).learned_shapes(5)
    assert FoveatedSpec(tile=6).learned_shapes(5) == {"bias": (5, 1), "pool_logits": (5, 6, 6)}
    assert FoveatedSpec(tile=6, levels=2).learned_shapes(5) == {"bias": (5, 2), "pool_logits": (5, 3, 3)}
    assert FoveatedSpec(tile=2, levels=2).learned_shapes(5) == {"bias": (5, 2)}

    def split(*specs):
        return HeadSplit(tuple(HeadGroup((head,), spec) for head, spec in enumerate(specs))).learned_shapes(len(specs))

    assert split(FoveatedSpec(0), FoveatedSpec(3)) == {"bias": (2, 1), "pool_logits": (2, 4, 4)}
    assert split(FoveatedSpec(0), FoveatedSpec(tile=3), DenseSpec()) == {"bias": (3, 1)}
    assert split(FoveatedSpec(tile=2, levels=2), FoveatedSpec(tile=1)) == {}


def test_a_radius_per_head_keeps_the_other_parameters():
    base = FoveatedSpec(1, 0.2, 2, levels=2)
    assert radius_per_head((0, 3, 0), base) == HeadSplit(
        (HeadGroup((0, 2), FoveatedSpec(0, 0.2, 2, levels=2)), HeadGroup((1,), FoveatedSpec(3, 0.2, 2, levels=2)))
    )
    assert radius_per_head((4, 4), base) == FoveatedSpec(4, 0.2, 2, levels=2)


def test_every_kind_of_the_design_is_there():
    assert tuple(SPECS) == ("dense", "clear", "foveated", "linear", "hybrid", "chunked")


@pytest.mark.parametrize("spec", EXAMPLES, ids=lambda spec: spec.kind)
def test_json_round_trip(spec):
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


@pytest.mark.parametrize("kind", SPECS)
def test_parameters_left_out_take_defaults(kind):
    assert spec_from_json({"kind": kind}) == SPECS[kind]()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"kind": "clear", "radius": 0}, "radius is a whole number of at least 1"),
        ({"kind": "clear", "radius": 8.0}, "radius=8.0"),
        ({"kind": "clear", "radius": True}, "radius=True"),
        ({"kind": "clear", "temporal_radius": -1}, "temporal_radius"),
        ({"kind": "clear", "down_factor": 0}, "down_factor"),
        ({"kind": "clear", "proportional": 1}, "proportional is true or false"),
        ({"kind": "clear", "window": 8}, "no parameter 'window'; it takes down_factor"),
        ({"kind": "dense", "radius": 8}, "no parameter 'radius'; it takes none"),
        ({"kind": "hybrid", "rate": 0}, "rate"),
        ({"kind": "hybrid", "stabilizer": "mean"}, "stabilizer is one of max, lse, common, got"),
        ({"kind": "linear", "feature_map": "exp"}, "feature_map is one of"),
        ({"kind": "chunked", "chunk_frames": 0}, "chunk_frames"),
        ({"kind": "chunked", "overlap_frames": -1}, "overlap_frames"),
        ({"kind": "sparse"}, "kind is one of dense, clear"),
        ({}, "kind is one of"),
        ("clear", "a spec is an object"),
        ([{"heads": [0, 1], "spec": {"kind": "dense"}}, {"heads": [1], "spec": {"kind": "dense"}}], "once each"),
        ([{"heads": [0, 2], "spec": {"kind": "dense"}}], "without gap"),
        ([{"heads": ["0"], "spec": {"kind": "dense"}}], "whole numbers"),
        ([{"head": 0}], "heads and spec"),
        ([{"heads": [0], "spec": []}], "one spec, not a list"),
        ([], "once each"),
    ],
)
def test_wrong_input_is_one_clear_sentence(data, words):
    with pytest.raises(ValueError, match="(?s).*" + words.replace("(", r"\(")) as error:
        spec_from_json(data)
    assert "\n" not in str(error.value)


def test_radius_per_head_groups_equal_radii():
    assert radius_per_head((8, 8)) == ClearSpec(8)
    split = radius_per_head((16, 8, 16), ClearSpec(1, down_factor=4))
    assert split == HeadSplit(
        (HeadGroup((1,), ClearSpec(8, down_factor=4)), HeadGroup((0, 2), ClearSpec(16, down_factor=4)))
    )
    assert groups_of(split, 3) == split.groups
    with pytest.raises(ValueError, match="names 3 heads for a site that has 4"):
        groups_of(split, 4)


def test_proportional_scale_of_clear():
    """Multipliers over 1 / sqrt(128) from the published processors: 1.074 plain and 1.195 pooled at 2048 x 2048."""
    tokens = 128 * 128 + 512
    assert ClearSpec().scale(128, tokens) == 128**-0.5
    assert ClearSpec(proportional=True).scale(128, tokens) * math.sqrt(128) == pytest.approx(1.074, abs=5e-4)
    pooled = ClearSpec(down_factor=4, proportional=True).scale(128, tokens) * math.sqrt(128)
    assert pooled == pytest.approx(1.195, abs=5e-4)
    assert ClearSpec(proportional=True).scale(128, 4608) == pytest.approx(128**-0.5)
