"""Receipts in this process: who finds which, what stands in them, and that nothing in a prompt can make them fail."""

import copy
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("linearize"), inner),
    max_leaves=6,
)


class FrozenDict(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")

    pop = setdefault = update = __delitem__ = __setitem__


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def two_branches(**sampler):
    """Return a prompt with windows in one picture and none in the other."""
    return {
        "load": node("UNETLoader", unet_name="x"),
        "clear": node("LinearizeCLEAR", model=["load", 0], radius=4),
        "windows": node("KSampler", model=["clear", 0], **sampler),
        "dense": node("KSampler", model=["load", 0], **sampler),
        "save": node("SaveImage", images=["windows", 0]),
        "other": node("SaveImage", images=["dense", 0]),
        "both": node("SaveImage", images=["windows", 0], more=["dense", 0]),
    }


@pytest.fixture
def prompts(comfy):
    """Executes nodes of prompts as ComfyUI does, as far as receipts can see."""
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext

    receipt, record = comfy.module("patching.receipt"), comfy.module("attention.runtime.record")
    receipt._receipts.clear()

    def queue(nodes, **extra_data):
        return receipt.note_prompt({"prompt": nodes, "extra_data": extra_data})["extra_data"].get("extra_pnginfo")

    @contextmanager
    def running(nodes, prompt_id="1"):
        prompt = DynamicPrompt(nodes)
        reset_progress_state(prompt_id, prompt)
        yield lambda node_id: CurrentNodeContext(prompt_id, node_id, 0)

    def sampled(radius=4, reason=None, trained=False):
        specs = comfy.module("attention.specs")
        ran = record.RunRecord(sampled=True)
        ran.ran[record.Ran("double.0", "clear", "torch")] += 1
        if reason is not None:
            ran.declined["double.0", reason] += 1
        site = SimpleNamespace(spec=specs.ClearSpec(radius), origin="", trained=trained)
        plan = comfy.module("attention.plans").Plan.of_sites("flux", {"double.0": site.spec})
        return SimpleNamespace(record=ran, sites={"double.0": site}, plan=lambda: plan)

    return SimpleNamespace(queue=queue, running=running, sampled=sampled, receipt=receipt, **vars(receipt))


def radii(info):
    """Return the radius of each receipt that a node which saves finds, all ways of reading agreeing."""
    found = info.get("linearize", [])
    assert ("linearize" in info) == ("linearize" in list(info)) == ("linearize" in dict(info)) == bool(found)
    assert {**info} == dict(info.items()) == info.copy() == (info | {}) == {key: info[key] for key in info}
    assert copy.deepcopy(info) == dict(*info.__reduce__()[1]) == dict(info)
    assert type(copy.deepcopy(info)) is type(copy.copy(info)) is dict and len(info) == len(dict(info))
    assert info.get("workflow") is None or json.loads(json.dumps(info)) == dict(info)
    merged = {"prompt": 1}
    merged.update(info)
    assert ("linearize" in merged) == bool(found)
    return [receipt["plan"]["sites"]["double.0"]["radius"] for receipt in found]


def test_a_receipt_is_in_the_pictures_of_its_sampling_and_in_no_other(prompts):
    info = prompts.queue(two_branches(seed=1), extra_pnginfo={"workflow": {"id": 7}})
    with prompts.running(two_branches(seed=1)) as at:
        with at("windows"):
            prompts.write_receipt(prompts.sampled())
        for place, expected in (("save", [4]), ("other", []), ("both", [4])):
            with at(place):
                assert radii(info) == expected
                assert info["workflow"] == {"id": 7}
    assert dict(info) == {"workflow": {"id": 7}}, "outside of a node it is what the client sent"


def test_a_cached_sampling_keeps_its_receipt_whatever_its_id(prompts):
    with prompts.running(two_branches(seed=1)) as at, at("windows"):
        prompts.write_receipt(prompts.sampled())
    renamed = json.loads(json.dumps(two_branches(seed=1)).replace('"windows"', '"17:4"'))
    renamed["save"]["inputs"]["filename_prefix"] = "new"
    for nodes, expected in ((renamed, [4]), (two_branches(seed=2), [])):
        info = prompts.queue(nodes)
        with prompts.running(nodes, "2") as at, at("save"):
            assert radii(info) == expected


def test_a_node_that_runs_anew_has_the_receipts_of_this_run_only(prompts):
    nodes = two_branches(seed=1)
    for prompt_id, radius in (("1", 4), ("2", 9)):
        with prompts.running(nodes, prompt_id) as at:
            for _ in range(2):  # a tiled sampling runs many times alike
                with at("windows"):
                    prompts.write_receipt(prompts.sampled(radius))
            with at("save"):
                assert radii(prompts.queue(nodes)) == [radius]
    with prompts.running(nodes, "3") as at:
        with at("windows"):
            runtime = prompts.sampled()
            runtime.record.ran.clear()
            prompts.write_receipt(runtime)
        with at("save"):
            assert radii(prompts.queue(nodes)) == []


def test_a_node_that_expands_hands_its_receipt_on_and_its_cached_result_has_it_too(prompts):
    nodes = {
        "group": node("Upscaler", seed=3),
        "save": node("SaveImage", images=["group", 0]),
        "clear": node("LinearizeCLEAR"),
    }
    with prompts.running(nodes, "1") as at:
        from comfy_execution.progress import get_progress_state

        prompt = get_progress_state().dynprompt
        prompt.add_ephemeral_node("group.0.0.1", node("KSampler", model=["clear", 0]), "group", "group")
        prompt.add_ephemeral_node("group.0.0.2", node("SaveImage", images=["group.0.0.1", 0]), "group", "group")
        prompt.add_ephemeral_node("group.0.0.3", node("SaveImage", images=["clear", 0]), "group", "group")
        with at("group.0.0.1"):
            prompts.write_receipt(prompts.sampled(6))
        for place, expected in (("save", [6]), ("group.0.0.2", [6]), ("group.0.0.3", [])):
            with at(place):
                assert radii(prompts.queue(nodes)) == expected
    with prompts.running(nodes, "2") as at, at("save"):
        assert radii(prompts.queue(nodes)) == [6]


def test_what_is_kept_is_bounded_by_results_not_by_prompts(prompts, monkeypatch):
    monkeypatch.setattr(prompts.receipt, "MAX_RESULTS", 30)
    infos = [prompts.queue(two_branches(seed=seed)) for seed in range(100)]
    for seed, info in enumerate(infos):
        with prompts.running(two_branches(seed=seed), str(seed)) as at:
            with at("windows"):
                prompts.write_receipt(prompts.sampled())
            with at("save"):
                assert radii(info) == [4]
    assert len(prompts.receipt._receipts) == 30


def test_a_long_chain_of_nodes_is_no_recursion(prompts):
    nodes = {str(n): node("Step", x=[str(n - 1), 0]) for n in range(1, 3000)} | {"0": node("LinearizeCLEAR")}
    with prompts.running(nodes) as at:
        with at("5"):
            prompts.write_receipt(prompts.sampled())
        with at("2999"):
            assert radii(prompts.queue(nodes)) == [4]


def test_the_receipt_holds_no_text_of_an_exception(comfy, prompts):
    decisions, layout = comfy.module("attention.runtime.decisions"), comfy.module("attention.layout")
    failed = decisions.why_failed("triton", RuntimeError("cannot open /data/ada/secret.cu"))
    trained = layout.Reason("mask", "trained weights on dense attention: an attention mask is given")
    assert prompts.receipt_of(prompts.sampled(reason=failed))["fell_back"] == ["failed"]
    assert prompts.receipt_of(prompts.sampled(reason=trained, trained=True))["fell_back"] == ["mask (trained weights)"]
    assert "ada" in failed.text and "ada" not in json.dumps(prompts.receipt_of(prompts.sampled(reason=failed)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    info=VALUES | st.dictionaries(st.text(max_size=5) | st.just("linearize"), VALUES, max_size=4),
    wrap=st.sampled_from([lambda value: value, lambda value: FrozenDict(value) if isinstance(value, dict) else value]),
)
def test_nothing_in_extra_pnginfo_costs_a_picture(prompts, info, wrap):
    nodes = two_branches(seed=1)
    before = json.dumps(info)
    given_info = wrap(copy.deepcopy(info))
    found = prompts.queue(nodes, extra_pnginfo=given_info)
    with prompts.running(nodes) as at:
        with at("windows"):
            prompts.write_receipt(prompts.sampled())
        with at("save"):
            if type(given_info) is dict or given_info is None:
                assert radii(found) == [4]
                json.dumps({key: found[key] for key in found})  # as a node that saves reads it
            else:
                assert json.dumps(found) == before, "what is no plain dictionary stays as it came"
        with at("other"):
            assert not isinstance(found, prompts.PictureInfo) or radii(found) == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, VALUES)
def test_no_request_makes_noting_it_fail(prompts, nodes, extra_data):
    for request in ({"prompt": nodes, "extra_data": extra_data}, {"prompt": {"1": nodes}}, nodes, {}):
        before = copy.deepcopy(request)
        assert prompts.note_prompt(request) == before


def test_a_receipt_that_fails_leaves_the_run_alone(prompts, monkeypatch, caplog):
    nodes = two_branches(seed=1)
    with prompts.running(nodes) as at:
        with at("windows"):
            prompts.write_receipt(SimpleNamespace())
        with at("gone"):
            prompts.write_receipt(prompts.sampled())
            assert radii(prompts.queue(nodes)) == []
    assert "a picture gets no receipt" in caplog.text
