"""Backends: who can run what, what `auto` takes, what an explicit wish does."""

import json

import pytest
import torch

from linearize.attention import (
    ClearSpec,
    DenseSpec,
    HeadGroup,
    HeadSplit,
    HybridSpec,
    Segment,
    TokenLayout,
    attention,
    grid_segment,
    radius_per_head,
    reference_attention,
)
from linearize.attention.gpu import self_test
from linearize.attention.layout import Reason
from linearize.attention.runtime.backends import BACKENDS, CallShape, choose_backend
from linearize.attention.spec_json import spec_from_json, spec_to_json
from linearize.attention.specs import ChunkedSpec, FoveatedSpec, LinearSpec, MappedSpec
from linearize.attention.students.learned import new_maps
from linearize.kernels import capability

LAYOUT = TokenLayout.of((Segment("text", 5), grid_segment("main", 1, 9, 14)))
SHAPE = (1, 3, LAYOUT.num_tokens, 8)


def call(spec, **changes):
    facts = {"layout": LAYOUT, "shape": SHAPE, "dtype": torch.float32, "device": torch.device("cpu"), **changes}
    return CallShape(spec, **facts)


# triton has its own tests: tests/kernels
@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "triton")])
def test_every_backend_gives_the_same(backend, relative_error):
    inputs = [torch.randn(SHAPE) for _ in range(3)]
    for spec in (ClearSpec(4), ClearSpec(3, down_factor=2), radius_per_head((2, 9, 4))):
        output = attention(*inputs, LAYOUT, spec, backend=backend)
        assert output.dtype == torch.float32
        assert relative_error(output, reference_attention(*inputs, LAYOUT, spec)) < 1e-5


def test_a_radius_per_head_runs_each_head_with_its_own(relative_error):
    inputs = [torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, LAYOUT, radius_per_head((6, 2, 6)))
    for head, radius in enumerate((6, 2, 6)):
        alone = attention(*(t[:, head : head + 1] for t in inputs), LAYOUT, ClearSpec(radius))
        assert relative_error(output[:, head : head + 1], alone) < 1e-12
    output.sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


SPLITS = {
    "a radius per head": radius_per_head((1, 4, 0), FoveatedSpec(top=0.2)),
    "levels, last heads first": HeadSplit(
        (HeadGroup((2, 0), FoveatedSpec(2, 0.0, levels=2)), HeadGroup((1,), FoveatedSpec(1, 0.0, levels=2)))
    ),
    "tiles and orders": HeadSplit(
        (HeadGroup((1,), FoveatedSpec(tile=3, order=1)), HeadGroup((0, 2), FoveatedSpec(1, 0.3, tile=3)))
    ),
    "tiles of one token": HeadSplit((HeadGroup((0,), FoveatedSpec(tile=1)), HeadGroup((1, 2), FoveatedSpec()))),
    "beside dense heads": HeadSplit((HeadGroup((0,), DenseSpec()), HeadGroup((2, 1), FoveatedSpec(top=0.2)))),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("spec", SPLITS.values(), ids=SPLITS)
def test_foveated_heads_run_each_with_its_own(spec, backend, relative_error):
    """Each head is the reference of its spec, alone and with its own row of what the site learned; plans keep it so."""
    spec = spec_from_json(json.loads(json.dumps(spec_to_json(spec))))
    inputs = [torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    learned = {name: torch.randn(shape, requires_grad=True) for name, shape in spec.learned_shapes(3).items()}
    output = attention(*inputs, LAYOUT, spec, backend=backend, **learned)
    for group in spec.groups:
        for head in group.heads:
            own = {n: t[head : head + 1] for n, t in learned.items() if n in group.spec.learned_shapes(1)}
            alone = reference_attention(*(t[:, head : head + 1] for t in inputs), LAYOUT, group.spec, **own)
            assert relative_error(output[:, head : head + 1], alone) < 1e-6
    (output * torch.randn_like(output)).sum().backward()
    for name, tensor in learned.items():
        learning = {head for group in spec.groups if name in group.spec.learned_shapes(1) for head in group.heads}
        assert {head for head in range(3) if tensor.grad[head].abs().sum() > 0} == learning, name


def test_auto_takes_torch_on_a_cpu_and_tells_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend, reasons = choose_backend(call(ClearSpec()))
    assert backend is BACKENDS["torch"]
    assert [str(reason) for reason in reasons] == ["backend triton needs an NVIDIA or AMD GPU, got cpu"]


def test_auto_leaves_the_interpreter_to_those_who_name_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(call(ClearSpec())) == (BACKENDS["torch"], ())


def test_auto_prefers_triton_and_takes_torch_where_it_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(self_test.CLEAR, "results", {})
    monkeypatch.setattr(self_test.SelfTest, "run", lambda test, case: None)
    monkeypatch.setattr(capability, "refusal", lambda *facts: None)
    assert choose_backend(call(ClearSpec())) == (BACKENDS["triton"], ())
    refusal = Reason("triton", "a self-test failed")
    monkeypatch.setattr(capability, "refusal", lambda *facts: (refusal.code, refusal.text))
    assert choose_backend(call(ClearSpec())) == (BACKENDS["torch"], (refusal,))
    assert choose_backend(call(ClearSpec()), "triton") == (None, (refusal,))


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (call(HeadSplit((HeadGroup((0, 1), HybridSpec()), HeadGroup((2,), ClearSpec(2))))), "kind"),
        (call(HybridSpec(feature_map="elu1", feature_dim=3)), "heads"),
        (call(radius_per_head((2, 3))), "heads"),
        (call(ClearSpec(), dtype=torch.int32), "dtype"),
        (call(ClearSpec(), shape=(1, 3, 7, 8)), "layout"),
    ],
)
def test_reasons(facts, code):
    backend, reasons = choose_backend(facts)
    assert backend is None and {reason.code for reason in reasons} == {code}
    assert len(set(reasons)) == len(reasons)


def test_the_reference_stops_at_its_size():
    layout = TokenLayout.of((grid_segment("main", 1, 128, 128),))
    backend, reasons = choose_backend(call(ClearSpec(), layout=layout, shape=(1, 1, 128 * 128, 8)), "reference")
    assert backend is None and "stops at 4608" in reasons[0].text


def test_explicit_backends_do_not_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="backend triton needs an NVIDIA or AMD GPU"):
        attention(query, query, query, LAYOUT, HybridSpec(), backend="triton")
    with pytest.raises(ValueError, match="backend triton does not run kind dense"):
        attention(query, query, query, LAYOUT, DenseSpec(), backend="triton")
    with pytest.raises(ValueError, match="backend is one of auto, triton, torch, reference, got 'flex'"):
        attention(query, query, query, LAYOUT, ClearSpec(), backend="flex")


@pytest.mark.parametrize("spec", [DenseSpec(), LinearSpec("hedgehog"), HybridSpec(3), ChunkedSpec(2, 1)], ids=str)
@pytest.mark.parametrize("with_maps", [False, True])
def test_every_kind_runs_on_torch_as_in_the_reference(spec, with_maps, relative_error):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, *SHAPE, generator=generator).unbind(0)
    maps = new_maps(spec, SHAPE[1], SHAPE[3]) if with_maps and isinstance(spec, MappedSpec) else None
    for each in maps or ():
        for parameter in each.parameters():
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    results = [attention(query, key, value, LAYOUT, spec, maps=maps, backend=name) for name in ("torch", "reference")]
    assert relative_error(*results) < 1e-4


def test_a_site_may_mix_windows_and_dense_heads(relative_error):
    query, key, value = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind(0)
    spec = HeadSplit((HeadGroup((0, 2), ClearSpec(2)), HeadGroup((1,), DenseSpec())))
    results = [attention(query, key, value, LAYOUT, spec, backend=name) for name in ("torch", "reference")]
    assert relative_error(*results) < 1e-5
