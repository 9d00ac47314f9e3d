"""Compiled kernels of the linear kinds at the sizes of Wan: errors against float64, determinism, binaries, memory.

Needs a GPU: `pytest -m gpu tests/kernels/test_mapped_gpu.py`. Guards are those of half precision: relative errors of
outputs and gradients against float64.
"""

from functools import partial

import pytest
import torch

from linearize.attention import TokenLayout, grid_segment, reference_attention
from linearize.attention.gpu import self_test
from linearize.attention.gpu.mapped import TRITON
from linearize.attention.kinds.feature_maps import MAPS
from linearize.attention.kinds.mapped import mapped_attention
from linearize.attention.specs import ChunkedSpec, HybridSpec, LinearSpec

mapped_with_triton = partial(mapped_attention, engine=TRITON)

pytestmark = pytest.mark.gpu
HEADS, SIZE = 12, 128
WAN = TokenLayout.of((grid_segment("main", 21, 30, 52),))  # 81 frames of 832 x 480: 32,760 tokens
SMALL = TokenLayout.of((grid_segment("main", 3, 30, 40),))
DTYPES = [torch.float16, torch.bfloat16]
GUARD = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def inputs_of(layout, device, dtype, heads=HEADS):
    """Return token-major query, key, value and gradient, as a host passes them."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (4, 1, layout.num_tokens, heads, SIZE)
    return list(torch.randn(shape, generator=generator, device=device).to(dtype).transpose(2, 3).unbind(0))


def maps_of(name, device, heads=HEADS):
    maps = tuple(MAPS[name](heads, SIZE) for _ in range(2))
    for number, each in enumerate(maps):
        each.reset(torch.Generator("cpu").manual_seed(number))
    return tuple(each.to(device) for each in maps)


def truth_of_rows(inputs, rows, spec, maps, head):
    """Return some rows of one head of a hybrid in float64; the scores of all rows would not fit."""
    query, key, value = (tensor[:, head : head + 1].double() for tensor in inputs[:3])
    phi_q, phi_k = (each(tensor.double())[:, head : head + 1] for each, tensor in zip(maps, inputs[:2], strict=True))
    exact = torch.arange(key.shape[2], device=key.device) % spec.rate == 0
    scores = query[:, :, rows] @ key[:, :, exact].transpose(-1, -2) * SIZE**-0.5
    weights = (scores if maps[0].is_exponential else scores - scores.amax(-1, keepdim=True)).exp()
    features, linear = phi_q[:, :, rows], phi_k[:, :, ~exact]
    numerator = weights @ value[:, :, exact] + features @ (linear.transpose(-1, -2) @ value[:, :, ~exact])
    return numerator / (weights.sum(-1, keepdim=True) + features @ linear.sum(2)[..., None])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("rate", [2, 4, 8])
@pytest.mark.parametrize("name", ["polynomial", "favor", "elu1"])
@torch.no_grad()
def test_hybrid_at_the_size_of_wan(dtype, rate, name, device, relative_error):
    inputs, maps = inputs_of(WAN, device, dtype), maps_of(name, device)
    output = mapped_with_triton(*inputs[:3], WAN, HybridSpec(rate), maps)
    again = mapped_with_triton(*inputs[:3], WAN, HybridSpec(rate), maps)
    assert torch.equal(output, again)
    rows = torch.cat([torch.arange(0, 32760, 509, device=device), torch.arange(32752, 32760, device=device)])
    for head in (0, 5, 11):
        expected = truth_of_rows(inputs, rows, HybridSpec(rate), maps, head)
        assert relative_error(output[:, head : head + 1, rows], expected) < GUARD[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["polynomial", "hedgehog", "favor", "elu1"])
@pytest.mark.parametrize(
    "spec",
    [HybridSpec(4), *(HybridSpec(2, stabilizer=each) for each in ("lse", "common")), LinearSpec(), ChunkedSpec(1, 1)],
    ids=["hybrid", "lse", "common", "linear", "chunked"],
)
def test_gradients(dtype, name, spec, device, relative_error):
    inputs, maps = inputs_of(SMALL, device, dtype, 2), maps_of(name, device, 2)
    parameters = [parameter for each in maps for parameter in each.parameters()]
    results = []
    for function in (mapped_with_triton, lambda *a: reference_attention(*a[:-1], maps=a[-1])):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
        output = function(*leaves, SMALL, spec, maps)
        results.append([output, *torch.autograd.grad(output, [*leaves, *parameters], inputs[3].to(output.dtype))])
    for mine, expected in zip(*results, strict=True):
        assert relative_error(mine, expected) < 2 * GUARD[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_gradients_at_the_size_of_wan_are_finite_and_equal_bit_for_bit(dtype, device):
    inputs, maps = inputs_of(WAN, device, dtype), maps_of("polynomial", device)
    runs = []
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
        output = mapped_with_triton(*leaves, WAN, HybridSpec(8), maps)
        runs.append(torch.autograd.grad(output, leaves, inputs[3]))
    assert all(bool(first.isfinite().all()) and torch.equal(first, second) for first, second in zip(*runs, strict=True))


@torch.no_grad()
def test_fused_maps_take_little_memory_beyond_what_they_gather(device):
    query, key, value, _ = inputs_of(WAN, device, torch.bfloat16)
    maps = maps_of("elu1", device)
    mapped_with_triton(query, key, value, WAN, HybridSpec(2), maps)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    mapped_with_triton(query, key, value, WAN, HybridSpec(2), maps)
    own = query.numel() * query.element_size()
    # query, keys and values gathered, two outputs more, and statistics
    assert torch.cuda.max_memory_allocated(device) - before < 6.3 * own


def test_one_binary_per_kernel_for_all_sizes_and_rates(device):
    from linearize.kernels.mapped_backward import mapped_dk_dv_kernel, mapped_dq_kernel, mapped_dx_kernel
    from linearize.kernels.mapped_forward import mapped_forward_kernel
    from linearize.kernels.state_forward import state_kernel

    kernels = (mapped_forward_kernel, mapped_dx_kernel, mapped_dq_kernel, mapped_dk_dv_kernel, state_kernel)
    maps, before = maps_of("hedgehog", device, 2), None
    for number, grid in enumerate([(1, 64, 64), (5, 30, 52), (3, 17, 23), (2, 45, 80), (1, 1, 16)]):
        layout = TokenLayout.of((grid_segment("main", *grid),))
        leaves = [tensor.requires_grad_() for tensor in inputs_of(layout, device, torch.bfloat16, 2)[:3]]
        for rate in (2, 3 + number):
            mapped_with_triton(*leaves, layout, HybridSpec(rate), maps).sum().backward()
        counts = [len(kernel.device_caches[device.index][0]) for kernel in kernels]
        assert before is None or counts == before, f"{grid} compiled anew"
        before = counts
    for kernel in kernels:
        assert all(binary.n_spills <= 2 for binary in kernel.device_caches[device.index][0].values())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_the_self_test_passes(dtype, size, device):
    assert self_test.mapped_error(self_test.Case(device, dtype, size, True)) < self_test.TOLERANCE[dtype]
