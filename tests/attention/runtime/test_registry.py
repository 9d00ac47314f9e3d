"""A kind is one spec and one entry: nothing else of the pack has to hear of it."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from linearize.attention import Segment, TokenLayout, attention, attention_cost, grid_segment
from linearize.attention.kinds.feature_maps import MAPS, Elu1
from linearize.attention.kinds.feature_maps import register as register_map
from linearize.attention.kinds.kind import KINDS, Kind, register
from linearize.attention.planning.report import describe_spec
from linearize.attention.runtime.backends import CallShape, choose_backend
from linearize.attention.spec_json import spec_from_json, spec_to_json
from linearize.attention.specs import SPECS, HeadGroup, HeadSplit, LinearSpec, Spec

LAYOUT = TokenLayout.of((Segment("text", 2), grid_segment("main", 1, 3, 4)))


@dataclass(frozen=True, slots=True)
class OwnSpec(Spec):
    """Every token sees itself alone, `times` over."""

    kind: ClassVar[str] = "own"
    told: ClassVar[tuple[str, ...]] = ("times",)
    times: int = 1


@pytest.fixture
def own(monkeypatch):
    for table in (SPECS, KINDS):
        monkeypatch.setitem(table, "own", None)  # forgotten after the test

    def run(query, key, value, layout, spec, learned, *, scale, memory):
        return value * spec.times

    def reference(query, key, value, layout, spec, learned, scale):
        return value * spec.times

    register(Kind(OwnSpec, reference, run, lambda spec, layout: layout.num_tokens, (1, 2, 3)))
    return OwnSpec(3)


def test_every_spec_has_an_entry():
    assert list(SPECS) == list(KINDS) and all(KINDS[name].spec is SPECS[name] for name in SPECS)


def test_a_new_kind_runs_is_stored_costs_and_is_told(own):
    inputs = torch.randn(3, 1, 2, 14, 8).unbind()
    for backend in ("auto", "torch", "reference"):
        assert torch.equal(attention(*inputs, LAYOUT, own, backend=backend), inputs[2] * 3)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(own)))) == own
    assert attention_cost(own, LAYOUT, 2, 8).pairs == 2 * 14
    assert describe_spec(own) == "own times 3" and describe_spec(OwnSpec()) == "own times 1"
    split = HeadSplit((HeadGroup((1,), own), HeadGroup((0,), OwnSpec(2))))
    times = torch.tensor([2.0, 3.0])[:, None, None]
    assert torch.equal(attention(*inputs, LAYOUT, split, backend="torch"), inputs[2] * times)


def test_kernels_decline_a_kind_that_has_none(own):
    call = CallShape(own, LAYOUT, (1, 2, 14, 8), torch.float16, torch.device("cpu"))
    assert [reason.text for reason in choose_backend(call, "triton")[1]] == ["backend triton does not run kind own"]


def test_a_new_feature_map_is_one_class(monkeypatch):
    monkeypatch.setitem(MAPS, "plain", None)

    @register_map
    class Plain(Elu1):
        name = "plain"

    inputs = torch.randn(3, 1, 2, 14, 8).unbind()
    expected = attention(*inputs, LAYOUT, LinearSpec("elu1"), backend="torch")
    assert torch.equal(attention(*inputs, LAYOUT, LinearSpec("plain"), backend="torch"), expected)
