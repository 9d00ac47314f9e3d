"""Nested options as JSON beside tensors: what can be stored comes back, and nothing else is taken for stored."""

import json

import pytest
import torch

from linearize.training.samples.nested import MAX_DEPTH, MOST_SEED, Record, can_store, has_record, pack, unpack

FIRST, SECOND = torch.arange(3.0), torch.ones(2, 2, dtype=torch.bfloat16)


def nested(depth):
    """Return lists inside each other, so many."""
    return [nested(depth - 1)] if depth else 1


def taken(data):
    return unpack(data, [FIRST, SECOND].__getitem__)


def test_lists_maps_records_and_tensors_come_back_as_they_were():
    value = {"refs": [SECOND, (1, 2.5, "x")], "control": Record("net", {"strength": 0.5, "hint": FIRST}), "none": None}
    tensors = []
    data = json.loads(json.dumps(pack(value, tensors)))
    assert [each is other for each, other in zip(tensors, (FIRST, SECOND), strict=True)] == [True, True]
    back = unpack(data, tensors.__getitem__)
    assert list(back) == ["control", "none", "refs"] and back["none"] is None
    assert back["refs"][0] is SECOND and back["refs"][1] == (1, 2.5, "x") and type(back["refs"]) is list
    assert back["control"].kind == "net" and back["control"].fields["strength"] == 0.5
    assert back["control"].fields["hint"] is FIRST


@pytest.mark.parametrize(
    "value",
    [True, "text", None, -MOST_SEED, 0.0, FIRST, [FIRST], (1, {"a": [Record("net", {"b": SECOND})]})],
    ids=range(8),
)
def test_plain_values_and_dense_tensors_can_be_stored(value):
    assert can_store(value)


@pytest.mark.parametrize(
    "value",
    [
        object(), MOST_SEED + 1, float("nan"), float("inf"), {1: "a"}, [1, object()], {"a": {1}},
        Record("net", {"a": object()}), torch.ones(2, dtype=torch.complex64), torch.ones(2, 2).to_sparse(),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_no_file_holds_cannot_be_stored(value):
    assert not can_store(value) and not can_store([value])


def test_what_is_stored_is_read_at_every_depth_that_can_be_stored():
    deepest = nested(MAX_DEPTH)
    assert can_store(deepest) and not can_store([deepest])
    assert taken(pack(deepest, [])) == deepest
    maps = {"a": 1}
    for _ in range(MAX_DEPTH - 1):
        maps = {"a": maps}
    assert can_store(maps) and not can_store({"a": maps}) and taken(pack(maps, [])) == maps
    with pytest.raises(ValueError, match="no option of a conditioning is stored as dict"):
        taken(pack(nested(MAX_DEPTH + 2), []))


@pytest.mark.parametrize(
    "data",
    [[], {}, {"list": 1}, {"tuple": {}}, {"map": []}, {"tensor": "0"}, {"tensor": True}, {"record": "net"},
     {"record": 1, "fields": {}}, {"record": "net", "fields": []}, {"list": [], "tuple": []}, float("nan")],
    ids=str,
)  # fmt: skip
def test_what_no_one_packed_is_refused(data):
    with pytest.raises(ValueError, match="no option of a conditioning is stored as"):
        taken(data)


def test_records_are_found_however_deep():
    value = pack({"a": [(1, {"b": Record("net", {"chain": [Record("other", {})]})})]}, [])
    assert has_record(value, "net") and has_record(value, "other") and not has_record(value, "a")
    assert not has_record("net", "net") and not has_record([], "net")
