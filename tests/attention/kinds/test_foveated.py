"""Foveated attention against its float64 oracle, and against what it must equal or approach."""

import math

import pytest
import torch

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.kinds import foveated, foveated_cells
from linearize.attention.kinds.foveated import foveated_attention, tiles_of
from linearize.attention.kinds.foveated_choice import choose_tiles, pool_weights
from linearize.attention.kinds.foveated_reference import boxes_of, distance, foveated_reference, tokens_of
from linearize.attention.layout import reference_segment
from linearize.attention.specs import FoveatedSpec


def layout_of(*grids, text=5):
    return TokenLayout.of((Segment("text", text), *(grid_segment("main", *grid) for grid in grids)))


LAYOUTS = {
    "picture": layout_of((1, 12, 16)),
    "primes": layout_of((1, 13, 19), text=3),
    "one token": layout_of((1, 1, 1), text=2),
    "one row": layout_of((1, 1, 23)),
    "no text": layout_of((1, 9, 10), text=0),
    "clip": layout_of((5, 6, 7)),
    "text between": TokenLayout.of(
        (grid_segment("main", 1, 6, 9), Segment("text", 4), grid_segment("reference", 1, 7, 3))
    ),
    "aligned reference": TokenLayout.of(
        (Segment("text", 3), grid_segment("main", 1, 10, 14), grid_segment("reference", 1, 5, 7))
    ),
    "clip and picture": TokenLayout.of(
        (grid_segment("main", 3, 6, 8), grid_segment("reference", 1, 6, 8), Segment("text", 4))
    ),
}
SPECS = {
    "near and chosen": FoveatedSpec(radius=1, top=0.2),
    "chosen alone": FoveatedSpec(radius=0, top=0.3),
    "near alone": FoveatedSpec(radius=3, top=0.0),
    "levels": FoveatedSpec(radius=2, top=0.0, levels=3),
    "levels and chosen": FoveatedSpec(radius=1, top=0.15, levels=4),
    "odd tile": FoveatedSpec(radius=2, top=0.1, tile=3),
    "tile of one": FoveatedSpec(radius=2, top=0.1, tile=1),
    "all frames": FoveatedSpec(radius=1, top=0.2, tile=2, frames=0),
    "two frames, levels": FoveatedSpec(radius=1, top=0.1, tile=2, frames=2, levels=2),
    "first order": FoveatedSpec(radius=1, top=0.2, order=1),
    "first order, levels": FoveatedSpec(radius=2, top=0.0, levels=3, order=1),
    "first order, levels and chosen": FoveatedSpec(radius=2, top=0.2, levels=2, order=1),
    "all": FoveatedSpec(radius=1, top=1.0),
}


def random_qkv(layout, heads=2, head_dim=8, batch=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, heads, layout.num_tokens, head_dim).to(dtype) for _ in range(3))


@pytest.fixture
def a_tile_each(monkeypatch):
    monkeypatch.setitem(foveated.CHUNK_VALUES, "cpu", 1)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_the_oracle(layout, spec, relative_error, tolerance):
    query, key, value = random_qkv(layout, batch=1)
    choice = tiles_of(query, key, value, layout, spec)
    truth = foveated_reference(query, key, value, layout, spec, None, choice)
    output = foveated_attention(query, key, value, layout, spec)
    assert relative_error(output, truth) < tolerance[torch.float32]


@pytest.mark.parametrize("name", SPECS)
def test_a_batch_in_many_chunks_is_the_oracle(name, a_tile_each, relative_error, tolerance):
    layout, spec = LAYOUTS["text between"], SPECS[name]
    query, key, value = random_qkv(layout)
    truth = foveated_reference(query, key, value, layout, spec, None, tiles_of(query, key, value, layout, spec))
    assert relative_error(foveated_attention(query, key, value, layout, spec), truth) < tolerance[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["near and chosen", "levels", "levels and chosen", "first order"])
def test_it_follows_the_dtype(name, dtype, relative_error, tolerance):
    layout, spec = LAYOUTS["primes"], SPECS[name]
    query, key, value = random_qkv(layout, dtype=dtype)
    choice = tiles_of(query, key, value, layout, spec)
    output = foveated_attention(query, key, value, layout, spec, choice=choice)
    assert output.dtype == dtype
    assert relative_error(output, foveated_reference(query, key, value, layout, spec, None, choice)) < tolerance[dtype]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("place", ["clip", "text between"])
def test_gradients_are_the_oracles(name, place, a_tile_each, relative_error):
    layout, spec = LAYOUTS[place], SPECS[name]
    inputs = random_qkv(layout, batch=1, head_dim=4, dtype=torch.float64)
    choice = tiles_of(*inputs, layout, spec)
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    weight = torch.randn_like(inputs[0])
    (foveated_attention(*ours, layout, spec, choice=choice) * weight).sum().backward()
    (foveated_reference(*theirs, layout, spec, None, choice) * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one.grad, other.grad) < 1e-10


def dense(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())


@pytest.mark.parametrize(
    "spec", [FoveatedSpec(top=1.0), FoveatedSpec(radius=99, top=0.0), FoveatedSpec(top=1.0, levels=3)]
)
def test_it_is_dense_where_everything_is_exact(spec, relative_error):
    layout = LAYOUTS["primes"]
    inputs = random_qkv(layout)
    assert relative_error(foveated_attention(*inputs, layout, spec), dense(*inputs)) < 1e-5


@pytest.mark.parametrize("spec", [FoveatedSpec(top=0.1), FoveatedSpec(radius=1, top=0.0, levels=3)])
def test_equal_keys_lose_nothing_in_means(spec, relative_error):
    """Each key counts once: where the keys of a cell are equal, means are exact, at borders too."""
    layout = LAYOUTS["primes"]
    query, _, value = random_qkv(layout)
    key = torch.randn(2, 2, 1, 8).expand(query.shape)
    assert relative_error(foveated_attention(query, key, value, layout, spec), dense(query, key, value)) < 1e-5


def test_it_does_not_write_into_its_inputs_and_takes_any_strides(relative_error):
    layout, spec = LAYOUTS["clip"], SPECS["near and chosen"]
    inputs = random_qkv(layout)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    copies = [tensor.clone() for tensor in strided]
    output = foveated_attention(*strided, layout, spec)
    assert all(torch.equal(one, other) for one, other in zip(strided, copies, strict=True))
    assert relative_error(output, foveated_attention(*inputs, layout, spec)) < 1e-6


def test_a_reference_is_a_grid_of_its_own():
    placed = TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 10, 14), reference_segment((1, 5, 7))))
    inputs, spec = random_qkv(placed), SPECS["near and chosen"]
    output = foveated_attention(*inputs, placed, spec)
    assert torch.equal(output, foveated_attention(*inputs, LAYOUTS["aligned reference"], spec))
    loose = TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 10, 14), Segment("reference", 35)))
    assert not torch.allclose(output, foveated_attention(*inputs, loose, spec))


def test_the_best_tiles_are_chosen_and_the_first_of_equal_ones():
    layout, spec = layout_of((1, 8, 16), text=0), FoveatedSpec(radius=1, top=0.25)
    query, key, value = torch.ones(1, 1, 128, 4), torch.zeros(1, 1, 128, 4), torch.zeros(1, 1, 128, 4)
    tiles = boxes_of(layout, spec, 4)
    key[0, 0, tokens_of(tiles[6])] = 1.0
    choice = tiles_of(query, key, value, layout, spec)
    assert choice[0, 0, 0].tolist() == [1, 6]  # itself is near, so tile 1 is the first of equal ones
    assert choice[0, 0, 6].tolist() == [0, 1]
    assert choice[0, 0, 1].tolist() == [0, 6]


@pytest.mark.parametrize("varied", ("keys", "values"))
def test_a_tile_whose_mean_errs_is_chosen(varied):
    layout, spec = layout_of((1, 8, 16), text=0), FoveatedSpec(radius=1, top=0.125)
    query, alternating = torch.ones(1, 1, 128, 4), torch.ones(1, 1, 128, 4)
    alternating[0, 0, 1::2] = -1.0
    key, value = alternating / 4, alternating / 4
    members = tokens_of(boxes_of(layout, spec, 4)[5])
    (key if varied == "keys" else value)[0, 0, members] *= 3
    assert tiles_of(query, key, value, layout, spec)[0, 0, 0].tolist() == [5]


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        (LAYOUTS["primes"], FoveatedSpec(radius=0, top=0.2)),
        (LAYOUTS["clip"], FoveatedSpec(radius=0, top=0.3, tile=2, frames=3)),
        (LAYOUTS["text between"], FoveatedSpec(radius=0, top=0.2, tile=3)),
    ],
    ids=("picture", "clip", "two grids"),
)
def test_the_choice_is_by_deviation_of_weights_times_that_of_values(layout, spec):
    query, key, value = random_qkv(layout, heads=1, batch=1)
    tiles, choice = boxes_of(layout, spec, spec.tile), tiles_of(query, key, value, layout, spec)[0, 0]
    query, key, value = (tensor[0, 0].double() for tensor in (query * 8**-0.5, key, value))
    for number, tile in enumerate(tiles):
        start, (_, height, width), (frames, _, _) = tile
        frame_of = [(token - start) // (height * width) for token in tokens_of(tile)]
        means = [query[[t for t, f in zip(tokens_of(tile), frame_of, strict=True) if f == frame]].mean(0)
                 for frame in frames]  # fmt: skip
        scores = []
        for other in tiles:
            keys, values = key[tokens_of(other)], value[tokens_of(other)]
            mean = float(torch.stack(means).mean(0) @ keys.mean(0))
            variance = float(torch.stack(means).square().mean(0) @ keys.var(0, unbiased=False))
            of_weights = math.sqrt(math.expm1(variance)) * math.exp(mean + variance / 2)  # of a log-normal
            of_values = float(values.var(0, unbiased=False).sum().sqrt())
            scores.append(of_weights * of_values)
        best = sorted(range(len(tiles)), key=lambda place: -scores[place])[: choice.shape[1]]
        assert choice[number].tolist() == sorted(best)


def test_no_candidates_are_no_choice():
    layout, spec = layout_of((1, 4, 8), text=0), FoveatedSpec(radius=99, top=1.0)
    assert (tiles_of(*random_qkv(layout), layout, spec) == -1).all()


def test_an_aligned_reference_is_near_where_the_picture_is():
    layout, spec = LAYOUTS["aligned reference"], FoveatedSpec(radius=1, top=0.0)
    tiles = boxes_of(layout, spec, 4)
    first_of_reference = next(n for n, tile in enumerate(tiles) if tile[1] == (1, 5, 7))
    assert distance(tiles[0], tiles[first_of_reference]) == 0
    assert distance(tiles[-1], tiles[0]) > 0
    other = TokenLayout.of((grid_segment("main", 1, 10, 14), grid_segment("reference", 1, 5, 20)))
    boxes = boxes_of(other, spec, 4)
    assert distance(boxes[0], boxes[-1]) == math.inf


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"radius": 0, "top": 0.0}, "radius or top"),
        ({"tile": 3, "levels": 2}, "even"),
        ({"top": 1.5}, "top"),
        ({"top": True}, "top"),
        ({"levels": 0}, "levels"),
        ({"order": 2}, "order"),
        ({"tile": 0}, "tile"),
    ],
)
def test_wrong_numbers_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        FoveatedSpec(**wrong)


def test_a_wrong_length_is_a_sentence():
    inputs = random_qkv(LAYOUTS["picture"])
    with pytest.raises(ValueError, match="tokens"):
        foveated_attention(*inputs, LAYOUTS["primes"], FoveatedSpec())


def test_tiles_that_are_too_many_are_refused_before_memory_is_taken():
    layout = layout_of((1, 512, 512), text=0)
    inputs = [torch.zeros(1, 1, 1, 4).expand(1, 1, layout.num_tokens, 4)] * 3
    with pytest.raises(ValueError, match="tile 1 cuts 262144 tokens into too many tiles; choose a larger one"):
        foveated_attention(*inputs, layout, FoveatedSpec(tile=1, top=0.1))
    with pytest.raises(ValueError, match="tile 4 cuts 262144 tokens"):
        foveated_attention(*inputs, layout, FoveatedSpec(tile=4, top=0.1, levels=4))


def test_a_table_is_the_same_in_one_piece_and_in_many(monkeypatch):
    layout = LAYOUTS["text between"].with_all_grids
    for spec in SPECS.values():
        whole = foveated_cells.cell_table(layout, spec, torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(foveated_cells, "CHUNK_PAIRS", 1)
            parts = foveated_cells.cell_table(layout, spec, torch.device("cpu"))
        for name in ("exact", "near", "means", "standing"):
            one, other = getattr(whole, name), getattr(parts, name)
            assert one is other is None or torch.equal(one, other), name


SMALL = {"clip": layout_of((2, 5, 9), text=2), "text between": LAYOUTS["text between"]}


def random_learned(spec, heads=2, seed=7):
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.learned_shapes(heads)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("place", SMALL)
def test_what_is_learned_is_the_oracles_and_so_are_gradients(name, place, a_tile_each, relative_error):
    layout, spec = SMALL[place], SPECS[name]
    inputs = random_qkv(layout, batch=1, head_dim=4, dtype=torch.float64)
    choice, weight = tiles_of(*inputs, layout, spec), torch.randn_like(inputs[0])
    ours, theirs = ({each: t.requires_grad_() for each, t in random_learned(spec).items()} for _ in range(2))
    output = foveated_attention(*inputs, layout, spec, choice=choice, **ours)
    truth = foveated_reference(*inputs, layout, spec, None, choice, **theirs)
    assert relative_error(output, truth) < 1e-12
    (output * weight).sum().backward()
    if spec.top == 1.0:  # no mean is left
        assert all(not tensor.grad.any() for tensor in ours.values())
        return
    (truth * weight).sum().backward()
    for each, tensor in ours.items():
        assert tensor.grad.norm() > 1e-3
        torch.testing.assert_close(tensor.grad, theirs[each].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["near and chosen", "levels", "levels and chosen"])
def test_gradients_of_everything_together_are_the_oracles(name, relative_error):
    layout, spec = SMALL["clip"], SPECS[name]
    inputs = random_qkv(layout, batch=2, head_dim=4, dtype=torch.float64)
    choice, weight = tiles_of(*inputs, layout, spec), torch.randn_like(inputs[0])
    grads = []
    for run in (
        lambda q, k, v, **learned: foveated_attention(q, k, v, layout, spec, choice=choice, **learned),
        lambda q, k, v, **learned: foveated_reference(q, k, v, layout, spec, None, choice, **learned),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, *random_learned(spec).values())]
        learned = dict(zip(spec.learned_shapes(2), leaves[3:], strict=True))
        (run(*leaves[:3], **learned) * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert relative_error(one, other) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_was_learned_starts_where_nothing_changes(layout, dtype):
    for spec in SPECS.values():
        inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in random_qkv(layout, dtype=dtype)]
        start = {name: torch.zeros(shape) for name, shape in spec.learned_shapes(2).items()}
        untrained = foveated_attention(*inputs, layout, spec)
        assert torch.equal(foveated_attention(*inputs, layout, spec, **start), untrained)


def test_content_is_chosen_by_plain_means(monkeypatch):
    layout, spec = LAYOUTS["primes"], SPECS["near and chosen"]
    inputs, chosen = random_qkv(layout), []
    monkeypatch.setattr(foveated, "choose_tiles", lambda *given: chosen.append(choose_tiles(*given)) or chosen[-1])
    foveated_attention(*inputs, layout, spec)
    foveated_attention(*inputs, layout, spec, **{name: t.float() for name, t in random_learned(spec).items()})
    assert torch.equal(*chosen)


def test_weights_of_a_ragged_cell_are_a_softmax_over_what_it_has():
    logits = torch.tensor([[[1.0, 2.0], [80.0, -3.0]]], requires_grad=True)
    weights = pool_weights(logits, (1, 3, 3))
    assert weights.shape == (1, 3, 3)
    torch.testing.assert_close(weights[0, :2, :2].flatten(), 4 * logits[0].flatten().softmax(0))
    torch.testing.assert_close(weights[0, :2, 2], 2 * logits[0, :, 0].softmax(0))
    torch.testing.assert_close(weights[0, 2, :2], 2 * logits[0, 0].softmax(0))
    assert weights[0, 2, 2].item() == 1.0
    weights.square().sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("learned", "words"),
    [
        ({"bias": torch.zeros(3, 1)}, r"bias has shape \(3, 1\), this spec with 2 heads has \(2, 1\)"),
        ({"pool_logits": torch.zeros(2, 2, 2)}, r"pool_logits has shape \(2, 2, 2\), .* has \(2, 4, 4\)"),
    ],
)
def test_a_wrong_shape_of_what_was_learned_is_a_sentence(learned, words):
    with pytest.raises(ValueError, match=words):
        foveated_attention(*random_qkv(LAYOUTS["primes"]), LAYOUTS["primes"], FoveatedSpec(), **learned)
    with pytest.raises(ValueError, match="has none"):
        spec = FoveatedSpec(tile=1)
        foveated_attention(*random_qkv(LAYOUTS["primes"]), LAYOUTS["primes"], spec, pool_logits=torch.zeros(2, 1, 1))
