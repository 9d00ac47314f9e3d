"""What choosing tiles costs beside the kernels that use the choice, in counted operations and bytes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.kinds import foveated_choice
from linearize.attention.kinds.foveated import table_of
from linearize.attention.kinds.foveated_choice import choose_tiles, means_of
from linearize.attention.memory import LongLived
from linearize.attention.planning.cost import foveated_pairs
from linearize.attention.specs import FoveatedSpec

SIZE, ITEM = 128, 2  # values of a head, bytes of one
VIEWS = ("view", "expand", "detach", "alias", "unsafe_view", "empty")


class Bytes(TorchDispatchMode):
    """Add up the bytes of all inputs and outputs of every operation that is not a view."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not (func.is_view or any(name in str(func) for name in VIEWS)):
            tensors = (each for each in tree_leaves((args, kwargs, output)) if isinstance(each, torch.Tensor))
            self.total += sum(each.numel() * each.element_size() for each in tensors)
        return output


def test_the_choice_is_at_most_a_twentieth_of_a_call_at_4096_pixels(monkeypatch):
    """Keep 0.1, tiles of 8 x 8: 0.2 % of the operations, and 4 % of the bytes that programs read of keys and values."""
    monkeypatch.setattr(foveated_choice, "READ_ONCE", ("cpu", "cuda"))
    spec = FoveatedSpec(radius=1, top=0.1 - 1 / 64, tile=8)
    layout = TokenLayout.of((Segment("text", 512), grid_segment("main", 1, 256, 256)))
    table = table_of(layout, spec, torch.device("cpu"), LongLived())
    query, key, value = (torch.randn(1, 1, layout.num_tokens, SIZE, dtype=torch.bfloat16) for _ in range(3))
    means = [means_of(tensor, layout, spec, table) for tensor in (key, value)]  # the kernels need them anyway
    with FlopCounterMode(display=False) as flops, Bytes() as read:
        choose_tiles(query, key, value, layout, spec, table, SIZE**-0.5, means)
    pairs = foveated_pairs(spec, layout)
    operations, bytes_read = pairs * 4 * SIZE, pairs / spec.tile**2 * 2 * SIZE * ITEM
    assert 0 < flops.get_total_flops() < 0.005 * operations
    assert 0.01 * bytes_read < read.total < 0.05 * bytes_read
