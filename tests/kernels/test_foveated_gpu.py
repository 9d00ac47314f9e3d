"""Foveated attention's compiled kernels at the sizes of FLUX and Wan: errors against float64, determinism, binaries.

Needs a GPU: `pytest -m gpu tests/kernels`. The truth is made for some tiles of queries, by gathering what they see.
"""

import time

import pytest
import torch

from linearize.attention import Segment, TokenLayout, attention, grid_segment
from linearize.attention.gpu import self_test
from linearize.attention.gpu.foveated import foveated_with_triton
from linearize.attention.kinds.foveated import foveated_attention, table_of, tiles_of
from linearize.attention.kinds.foveated_choice import means_of
from linearize.attention.kinds.foveated_chunks import lists_of
from linearize.attention.memory import LongLived
from linearize.attention.runtime.backends import BACKENDS, CallShape, choose_backend
from linearize.attention.specs import FoveatedSpec

pytestmark = pytest.mark.gpu
SIZE = 128
SPECS = {
    "8 x 8": FoveatedSpec(1, 0.08, 8),
    "4 x 4": FoveatedSpec(1, 0.04, 4),
    "by distance": FoveatedSpec(8, 0.0, 8, levels=3),
    "levels and chosen": FoveatedSpec(1, 0.05, 8, levels=3),
}
WAN = TokenLayout.of((grid_segment("main", 21, 30, 52),))  # 81 frames of 832 x 480


def flux(pixels, text=512, width=0):
    return TokenLayout.of((Segment("text", text), grid_segment("main", 1, pixels // 16, (width or pixels) // 16)))


def inputs_of(layout, device, dtype=torch.bfloat16, heads=24, size=SIZE):
    """Return q, k, v as views of one wide tensor, with NaN in what is not theirs."""
    generator = torch.Generator(device).manual_seed(0)
    fused = torch.full((1, layout.num_tokens, 7 * heads * size), float("nan"), device=device, dtype=dtype)
    own = fused[..., : 3 * heads * size].normal_(generator=generator)
    return list(own.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).unbind(0))


def truth_of(tile, head, inputs, layout, spec, choice):
    """Return the output of the queries of a tile of one head in float64, and their tokens."""
    table = table_of(layout, spec, inputs[0].device, LongLived())
    cells, listed = (None if each is None else each[0] for each in lists_of(slice(tile, tile + 1), table, spec, choice))
    cells, rows = cells[head % len(cells), 0], table.tiles[tile]
    exact = table.cells[cells[cells >= 0]].flatten()
    if listed is None:
        means = torch.ones(len(table.sizes), dtype=torch.bool, device=exact.device)
        means[cells[cells >= 0]] = False
        means = means.nonzero().flatten()
    else:
        means = listed[head % len(listed), 0]
        means = means[means >= 0]
    tokens = torch.cat([table.globals, exact[exact >= 0]])
    query, key, value = (tensor[0, head].double() for tensor in inputs)
    keys, values = (
        torch.cat([tensor[tokens], means_of(given, layout, spec, table)[0, head, means].double()])
        for tensor, given in ((key, inputs[1]), (value, inputs[2]))
    )
    rows = rows[rows >= 0]
    bias = torch.cat([table.sizes.new_zeros(len(tokens)), table.sizes[means].log()]).double()
    return torch.softmax(query[rows] @ keys.T * SIZE**-0.5 + bias, -1) @ values, rows


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", [flux(1024), flux(4096, 77), WAN], ids=["1024", "4096", "wan"])
def test_some_tiles_are_the_oracle(name, layout, device, relative_error):
    spec, inputs = SPECS[name], inputs_of(layout, device)
    choice = tiles_of(*inputs, layout, spec)
    output = foveated_with_triton(*inputs, layout, spec, choice=choice)
    assert bool(output.isfinite().all())
    tiles = choice.shape[2]
    for tile in (0, tiles // 3, tiles // 2 + 1, tiles - 1):
        for head in (0, 23):
            truth, rows = truth_of(tile, head, inputs, layout, spec, choice)
            assert relative_error(output[0, head, rows], truth) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_the_torch_backend(name, dtype, device, relative_error):
    """The torch backend computes in fp32 and is tested against the oracle."""
    layout, spec = flux(640, 77, 1008), SPECS[name]
    inputs = [tensor.requires_grad_() for tensor in inputs_of(layout, device, dtype, 4)]
    choice, grad = tiles_of(*inputs, layout, spec), torch.randn_like(inputs[0])
    found, true = (
        torch.autograd.grad(run(*inputs, layout, spec, choice=choice), inputs, grad)
        for run in (foveated_with_triton, foveated_attention)
    )
    for mine, other in zip(found, true, strict=True):
        assert relative_error(mine, other) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("name", SPECS)
def test_two_runs_are_equal_bit_for_bit(name, size, device):
    layout, spec = flux(1024), SPECS[name]
    inputs = [tensor.requires_grad_() for tensor in inputs_of(layout, device, size=size)]
    choice = tiles_of(*inputs, layout, spec)
    outputs = [foveated_with_triton(*inputs, layout, spec, choice=choice) for _ in range(2)]
    assert torch.equal(*outputs)
    first, second = (torch.autograd.grad(output, inputs, torch.ones_like(output)) for output in outputs)
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


def test_one_binary_per_kernel_for_all_sizes_and_lists(device):
    from linearize.kernels.foveated_backward import foveated_dk_dv_kernel, foveated_dq_kernel, foveated_means_kernel
    from linearize.kernels.foveated_forward import foveated_forward_kernel

    kernels = (foveated_forward_kernel, foveated_dq_kernel, foveated_dk_dv_kernel, foveated_means_kernel)
    specs, before = (FoveatedSpec(1, 0.08, 8), FoveatedSpec(9, 0.3, 8), FoveatedSpec(1, 0.02, 7)), None
    for number, (height, width) in enumerate([(1024, 1024), (832, 1216), (976, 720), (1360, 16), (2048, 1024)]):
        layout = flux(height, (512, 256, 77, 0, 1)[number], width)
        inputs = [tensor.requires_grad_() for tensor in inputs_of(layout, device, heads=2)]
        for spec in specs:
            foveated_with_triton(*inputs, layout, spec).sum().backward()
            counts = [len(kernel.device_caches[device.index][0]) for kernel in kernels]
            assert before is None or counts == before, f"{height} x {width} compiled anew"
            before = counts


@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_the_self_test_passes_in_less_than_two_seconds_once_compiled(size, device):
    case = self_test.Case(device, torch.bfloat16, size, True)
    assert self_test.FOVEATED.run(case) is None
    start = time.monotonic()
    assert self_test.FOVEATED.run(case) is None
    assert time.monotonic() - start < 2


def test_auto_takes_triton(device):
    layout = flux(1024)
    shape = (1, 24, layout.num_tokens, SIZE)
    chosen, reasons = choose_backend(CallShape(FoveatedSpec(), layout, shape, torch.bfloat16, device))
    assert chosen is BACKENDS["triton"] and reasons == ()
    chosen, reasons = choose_backend(CallShape(FoveatedSpec(order=1), layout, shape, torch.bfloat16, device))
    assert chosen is BACKENDS["torch"] and [reason.code for reason in reasons] == ["order"]


def test_little_memory_beyond_inputs_and_output(device):
    layout, memory, spec = flux(4096), LongLived(), SPECS["8 x 8"]
    inputs = inputs_of(layout, device)

    def call():
        return attention(*inputs, layout, spec, backend="triton", memory=memory)

    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = call()
    own = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    peak = torch.cuda.max_memory_allocated(device) - before - output.numel() * output.element_size()
    assert peak < 0.4 * own  # the scores of tiles while they are chosen, and the lists
