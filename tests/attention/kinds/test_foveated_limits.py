"""Foveated attention where it could break: numbers without an order, and what choices and tables take."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.gpu import foveated as on_triton
from linearize.attention.kinds import foveated, foveated_choice
from linearize.attention.kinds.foveated import foveated_attention, table_of, tiles_of
from linearize.attention.kinds.foveated_cells import cell_table
from linearize.attention.kinds.foveated_chunks import Plan
from linearize.attention.memory import LongLived
from linearize.attention.specs import FoveatedSpec
from linearize.kernels import foveated_table

LEVELS = pytest.mark.parametrize("levels", [1, 3])


def layout_of(rows, columns, text=3):
    return TokenLayout.of((Segment("text", text), grid_segment("main", 1, rows, columns)))


def random_qkv(layout, batch, heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, layout.num_tokens, head_dim, generator=generator) for _ in range(3)]


class Held(TorchDispatchMode):
    """Count the bytes of the tensors that operations made and that still live, and their peak."""

    def __init__(self, *given):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return output


class Distances(TorchDispatchMode):
    """Count the numbers in double precision that operations write; distances are."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (each for each in tree_leaves(output) if isinstance(each, torch.Tensor))
            self.total += sum(each.numel() for each in tensors if each.dtype == torch.float64)
        return output


@LEVELS
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", range(3), ids=("query", "key", "value"))
def test_a_number_without_an_order_spoils_its_own_head_alone(place, wrong, levels):
    """Dense attention too gives NaN there; the choice holds tiles once each, and other heads are what they were."""
    layout, spec = layout_of(13, 19), FoveatedSpec(radius=1, top=0.2, levels=levels)
    inputs = random_qkv(layout, batch=2, heads=2, head_dim=8)
    choice, output = tiles_of(*inputs, layout, spec), foveated_attention(*inputs, layout, spec)
    inputs[place][0, 1, 30, 2] = wrong
    spoiled = tiles_of(*inputs, layout, spec)
    kept = torch.tensor([[True, False], [True, True]])
    assert torch.equal(spoiled[kept], choice[kept])
    assert bool(((spoiled.diff(dim=-1) > 0) | (spoiled[..., 1:] < 0)).all())
    assert torch.equal(foveated_attention(*inputs, layout, spec)[kept], output[kept])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setitem(foveated_choice.CHUNK_SCORES, "cpu", 2**14)
    monkeypatch.setattr(on_triton, "CHUNK_MARKS", 2**14)
    for name in ("MOST_MARKED", "MOST_SORTED"):
        monkeypatch.setattr(foveated_table, name, 2**14)


def test_a_chosen_tile_costs_few_bytes(small_pieces):
    """They count: 24 heads of a picture of 8192 pixels a side choose 600 million tiles of 4 x 4 at keep 0.15."""
    layout, spec, memory = layout_of(64, 64), FoveatedSpec(radius=1, top=0.2, tile=2), LongLived()
    inputs = random_qkv(layout, batch=1, heads=3, head_dim=4)
    table = table_of(layout.with_all_grids, spec, torch.device("cpu"), memory)
    with Held() as held:
        choice = tiles_of(*inputs, layout, spec, memory=memory)
    assert choice.shape == (1, 3, 1024, 204)
    assert 4 <= held.peak / choice.numel() < 8
    with Held(choice) as held:
        on_triton._table(table, spec, choice)
    assert 4 <= held.peak / choice.numel() < 13


def test_chunks_hold_no_more_than_they_may(monkeypatch):
    layout, most, memory = layout_of(64, 48), 2**18, LongLived()
    monkeypatch.setitem(foveated.CHUNK_VALUES, "cpu", most)
    inputs = random_qkv(layout, batch=1, heads=2, head_dim=8)
    for spec in (FoveatedSpec(1, 0.05), FoveatedSpec(2, 0.0, levels=3), FoveatedSpec(1, 0.05, levels=3)):
        table = table_of(layout.with_all_grids, spec, torch.device("cpu"), memory)
        plan = Plan(spec, table, tiles_of(*inputs, layout, spec), 1.0)
        for chunk in foveated._chunks(inputs[0], plan):
            tiles, queries = chunk.queries.shape
            listed = chunk.tokens.shape[-1] + (0 if chunk.means is None else chunk.means.shape[-1])
            seen = listed + len(table.globals) + plan.num_shared
            assert tiles == 1 or 2 * tiles * (2 * listed * 8 + queries * seen) <= most, spec


@pytest.mark.parametrize("grid", [(1, 64, 128), (9, 16, 24)], ids=("picture", "clip"))
def test_a_table_computes_each_distance_about_once(grid):
    """They count: 8192 pixels a side have 270 million pairs of tiles of 4 x 4, and each axis apart has few."""
    layout, spec = TokenLayout.of((grid_segment("main", *grid),)), FoveatedSpec(radius=1, top=0.1, tile=2, frames=3)
    cell_table(layout, spec, torch.device("cpu"))
    with Distances() as written:
        table = cell_table(layout, spec, torch.device("cpu"))
    assert 1 <= written.total / len(table.tiles) ** 2 < 3
