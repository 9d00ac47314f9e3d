"""Linear, hybrid and chunked attention against the float64 oracle, and the identities that hold between them."""

import pytest
import torch

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.kinds import linear as linear_module
from linearize.attention.kinds.chunked import CausalStream
from linearize.attention.kinds.feature_maps import MAPS
from linearize.attention.kinds.mapped import mapped_attention
from linearize.attention.kinds.reference import reference_attention
from linearize.attention.specs import STABILIZERS, ChunkedSpec, HybridSpec, LinearSpec

LAYOUTS = {
    "picture": TokenLayout((Segment("text", 5), grid_segment("main", 1, 7, 5))),
    "no text": TokenLayout((grid_segment("main", 1, 3, 11),)),
    "clip": TokenLayout((grid_segment("main", 7, 3, 2), Segment("text", 4))),
    "two grids": TokenLayout((Segment("text", 1), grid_segment("main", 3, 2, 3), grid_segment("reference", 2, 2, 2))),
    "one token": TokenLayout((grid_segment("main", 1, 1, 1),)),
    "texts around": TokenLayout((Segment("text", 3), grid_segment("main", 3, 2, 3), Segment("pad", 2))),
}
SPECS = {
    "linear": LinearSpec(),
    "hybrid 2": HybridSpec(2),
    "hybrid 3 lse": HybridSpec(3, stabilizer="lse"),
    "hybrid 2 common": HybridSpec(2, stabilizer="common"),
    "hybrid 1000": HybridSpec(1000),
    "chunked": ChunkedSpec(2, 1),
    "chunked causal": ChunkedSpec(3, 1, causal=True),
    "chunked wide overlap": ChunkedSpec(2, 3),
    "chunked no overlap": ChunkedSpec(3, 0, causal=True),
}


def small_chunks(monkeypatch):
    """Make chunks of 5 tokens."""
    monkeypatch.setattr(linear_module, "CHUNK_VALUES", 1)
    monkeypatch.setattr(linear_module, "MIN_CHUNK", 5)
    assert len(list(linear_module.chunks(27, 1))) == 6


@pytest.mark.parametrize(("stabilizer", "width"), [("max", 16 + 10), ("common", 16 + 10), ("lse", 16)])
def test_tokens_are_cut_by_all_that_is_held_of_them(stabilizer, width, monkeypatch):
    """Features of both heads, and scores of exact keys where no dense kernel takes them."""
    lengths, recomputed = [], linear_module.recomputed
    monkeypatch.setattr(linear_module, "MIN_CHUNK", 1)
    monkeypatch.setattr(
        linear_module, "recomputed", lambda f, part: (lengths.append(part.stop - part.start), recomputed(f, part))[1]
    )
    phi_q, phi_k = make_maps()
    assert phi_q.num_features == phi_k.num_features == 16
    many, few = torch.ones(1, 2, 24, 8), torch.ones(1, 2, 10, 8)
    monkeypatch.setattr(linear_module, "CHUNK_VALUES", 2 * 5 * 16)
    state = linear_module.summarise(many, many, phi_k, stabilizer=stabilizer)
    monkeypatch.setattr(linear_module, "CHUNK_VALUES", 2 * 5 * width)
    linear_module.mix(many, few, few, state, phi_q, stabilizer=stabilizer)
    assert lengths == [5, 5, 5, 5, 4] * 2


def make_maps(name="polynomial", heads=2, size=8, seed=0):
    maps = tuple(MAPS[name](heads, size) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (parameter for each in maps for parameter in each.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return maps


def tensors(layout, dtype=torch.float32, size=8, batch=2, grad=False):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 2, layout.num_tokens, size)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_forward_equals_the_reference(spec, layout, dtype, relative_error, tolerance):
    inputs, maps = tensors(layout, dtype), make_maps()
    with torch.no_grad():
        output = mapped_attention(*inputs, layout, spec, maps)
        truth = reference_attention(*inputs, layout, spec, maps=maps)
    assert output.dtype == dtype and output.isfinite().all()
    assert relative_error(output, truth) < tolerance[dtype]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_equal_the_references(spec, relative_error, monkeypatch):
    small_chunks(monkeypatch)  # each computed again
    layout, maps = LAYOUTS["clip"], make_maps()
    inputs = tensors(layout, torch.float64, grad=True)
    leaves = [*inputs, *(parameter for each in maps for parameter in each.parameters())]
    weight = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = mapped_attention(*inputs, layout, spec, maps)
    truth = reference_attention(*inputs, layout, spec, maps=maps)
    found, expected = (torch.autograd.grad((each * weight).sum(), leaves) for each in (output, truth))
    for mine, true in zip(found, expected, strict=True):
        assert relative_error(mine, true) < (1e-10 if mine.dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", MAPS)
def test_every_map_runs_in_every_kind(name, relative_error):
    layout, maps = LAYOUTS["clip"], make_maps(name)
    inputs = tensors(layout)
    for spec in (SPECS["linear"], SPECS["hybrid 2"], SPECS["chunked causal"]):
        with torch.no_grad():
            error = relative_error(
                mapped_attention(*inputs, layout, spec, maps), reference_attention(*inputs, layout, spec, maps=maps)
            )
        assert error < 1e-4, spec.kind


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_rate_1_is_dense_attention(stabilizer):
    layout = LAYOUTS["picture"]
    inputs = tensors(layout)
    output = mapped_attention(*inputs, layout, HybridSpec(1, stabilizer=stabilizer), make_maps())
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert (output - dense).abs().max() < 1e-5


def test_a_rate_beyond_the_grid_is_linear_with_its_first_token_exact(relative_error):
    layout, maps = LAYOUTS["no text"], make_maps()
    inputs = tensors(layout)
    split = TokenLayout((Segment("first", 1), grid_segment("main", 1, 1, layout.num_tokens - 1)))
    hybrid = mapped_attention(*inputs, layout, HybridSpec(500), maps)
    linear = mapped_attention(*inputs, split, LinearSpec(), maps)
    assert relative_error(hybrid[:, :, 1:], linear[:, :, 1:]) < 1e-5


def test_a_chunk_that_holds_the_clip_is_dense_attention():
    layout = LAYOUTS["clip"]
    inputs = tensors(layout)
    output = mapped_attention(*inputs, layout, ChunkedSpec(7, 0), make_maps())
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert (output - dense).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["polynomial", "favor", "relu"])
@pytest.mark.parametrize(("chunk", "overlap"), [(3, 0), (3, 1), (2, 1), (2, 2), (1, 3)])
def test_the_stream_equals_the_direct_form(chunk, overlap, name, relative_error):
    layout, spec = TokenLayout((grid_segment("main", 7, 3, 2),)), ChunkedSpec(chunk, overlap, True)
    maps = make_maps(name)
    inputs = tensors(layout, torch.float64)
    stream, step = CausalStream(spec, maps, cells=6, scale=0.7), chunk * 6
    with torch.no_grad():
        parts = [stream.step(*(t[:, :, start : start + step] for t in inputs)) for start in range(0, 42, step)]
        assert relative_error(torch.cat(parts, 2), mapped_attention(*inputs, layout, spec, maps, scale=0.7)) < 1e-12
    assert stream._recent[0].shape[2] == overlap * 6


def test_a_stream_has_to_be_causal():
    with pytest.raises(ValueError, match="causal=True"):
        CausalStream(ChunkedSpec(2, 1), make_maps(), 4)


def parts(tokens, *, batch=2, heads=2, size=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((batch, heads, tokens, size), generator=generator).to(dtype) for _ in range(3)]


CANNOT = {
    "no token": (parts(0), r"1 to 2 whole frames of 3 tokens, got 0 tokens"),
    "no whole frame": (parts(5), r"1 to 2 whole frames of 3 tokens, got 5 tokens"),
    "more than a chunk": (parts(9), r"1 to 2 whole frames of 3 tokens, got 9 tokens"),
    "fewer keys": ([*parts(6)[:2], parts(3)[2]], r"one shape \(B, H, n, D\), got .*\(2, 2, 3, 8\)"),
    "wider values": ([*parts(6)[:2], parts(6, size=16)[2]], "one shape"),
    "three axes": ([each[0] for each in parts(6)], "one shape"),
    "another batch": (parts(6, batch=1), "there were 2 clips in torch.float32 on cpu, now 1 in torch.float32 on cpu"),
    "more heads": (parts(6, heads=4), "the feature maps are for 2 heads of 8, the step has 4 of 8"),
    "larger heads": (parts(6, size=16), "the feature maps are for 2 heads of 8, the step has 2 of 16"),
    "another dtype": (parts(6, dtype=torch.float64), r"now 2 in torch\.float64"),
    "mixed dtypes": ([*parts(6)[:2], parts(6, dtype=torch.half)[2]], "one dtype on one device, got torch.float16"),
    "whole numbers": (parts(6, dtype=torch.int64), "floating point numbers"),
    "another device": ([each.to("meta") for each in parts(6)], "on cpu, now 2 in torch.float32 on meta"),
    "mixed devices": ([*parts(6)[:2], parts(6)[2].to("meta")], "one dtype on one device"),
}


@pytest.mark.parametrize(("wrong", "words"), CANNOT.values(), ids=CANNOT)
def test_a_stream_refuses_a_step_that_it_cannot_take_and_goes_on(wrong, words):
    maps, good = make_maps(), [parts(6, seed=seed) for seed in (1, 2, 3)]
    stream, plain = (CausalStream(ChunkedSpec(2, 1, causal=True), maps, cells=3) for _ in range(2))
    for step in good:
        if step is not good[0]:
            with pytest.raises(ValueError, match=words) as caught:
                stream.step(*wrong)
            assert "\n" not in str(caught.value)
        assert torch.equal(stream.step(*step), plain.step(*step))


@pytest.mark.parametrize("name", ["no token", "no whole frame", "more than a chunk", "fewer keys", "more heads"])
def test_a_first_step_is_refused_too(name):
    stream, (wrong, words) = CausalStream(ChunkedSpec(2, 1, causal=True), make_maps(), cells=3), CANNOT[name]
    with pytest.raises(ValueError, match=words):
        stream.step(*wrong)
    assert stream.step(*parts(6)).shape == (2, 2, 6, 8)


def test_a_stream_is_over_after_a_short_chunk():
    stream = CausalStream(ChunkedSpec(2, 1, causal=True), make_maps(), cells=3)
    stream.step(*parts(6))
    stream.step(*parts(3))
    for tokens in (3, 6):
        with pytest.raises(ValueError, match="the clip ended with a chunk that was short; a new clip needs a new stre"):
            stream.step(*parts(tokens))


@pytest.mark.parametrize("cells", [0, -3, 2.0, True])
def test_a_frame_of_a_stream_has_tokens(cells):
    with pytest.raises(ValueError, match="a frame has a whole number of tokens, at least 1"):
        CausalStream(ChunkedSpec(2, 1, causal=True), make_maps(), cells)


@pytest.mark.parametrize("name", ["linear", "hybrid 2", "chunked"])
def test_large_half_precision_inputs_do_not_overflow(name):
    layout = LAYOUTS["clip"]
    spec = SPECS[name]
    inputs = [tensor * 200 for tensor in tensors(layout, torch.float16)]
    with torch.no_grad():
        output = mapped_attention(*inputs, layout, spec, make_maps())
    assert output.isfinite().all() and output.abs().max() <= inputs[2].abs().max() * 1.01


@pytest.mark.parametrize("name", ["linear", "hybrid 2", "hybrid 3 lse", "hybrid 2 common", "chunked causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_weights_sum_to_one_for_large_half_precision_inputs(name, feature_map):
    layout = LAYOUTS["clip"]
    spec = SPECS[name]
    query, key, value = (tensor * 100 for tensor in tensors(layout, torch.float16))
    with torch.no_grad():
        output = mapped_attention(query, key, torch.ones_like(value), layout, spec, make_maps(feature_map))
    assert (output - 1).abs().max() < 2e-3


def apart(name, heads=2, size=8):
    """Return maps, queries and keys (2, heads, 33, size) whose features meet in next to nothing."""
    maps, generator = make_maps(name, heads, size), torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, heads, 1, size, generator=generator).expand(2, heads, 33, size) for _ in range(2))
    if name == "polynomial":
        for each in maps:
            each.bias_2.data.fill_(-200.0)
    if name == "linfusion":
        for each in maps:
            each.weight_2.data.zero_()
    return (maps, query * 200, key * 200) if name == "hedgehog" else (maps, -query.abs() * 200 - 50, -key.abs() - 50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_linear_attention_does_not_shrink_where_features_do_not_meet(name, dtype):
    layout, (maps, query, key) = LAYOUTS["no text"], apart(name)
    if not maps[0].is_exponential:
        products = maps[0].map(query.float()) @ maps[1].map(key.float()).transpose(-1, -2)
        assert (products.sum(-1) < 1e-12).any(), "or the test is of something else"
    query, key = (tensor.to(dtype).requires_grad_() for tensor in (query, key))
    value = torch.ones_like(query)
    output = mapped_attention(query, key, value, layout, LinearSpec(), maps)
    assert (output - 1).abs().max() < 1e-5
    assert all(each.isfinite().all() for each in torch.autograd.grad(output.float().square().sum(), (query, key)))


@pytest.mark.parametrize("name", ["linear", "hybrid 2", "hybrid 3 lse", "hybrid 2 common", "chunked"])
def test_chunks_of_any_size_give_the_same(name, monkeypatch, relative_error):
    layout, maps = LAYOUTS["two grids"], make_maps()
    spec = SPECS[name]
    inputs = tensors(layout)
    whole = mapped_attention(*inputs, layout, spec, maps)
    small_chunks(monkeypatch)
    assert relative_error(mapped_attention(*inputs, layout, spec, maps), whole) < 1e-6


@pytest.mark.parametrize("name", ["linear", "hybrid 2", "chunked"])
def test_a_wrong_number_of_tokens_is_one_sentence(name):
    spec = SPECS[name]
    inputs = tensors(LAYOUTS["picture"])
    with pytest.raises(ValueError, match="expected"):
        mapped_attention(*inputs, LAYOUTS["clip"], spec, make_maps())
