"""What all launches of kernels do with their tensors: strides, scales, devices. Imports no Triton."""

import contextlib
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def log2_scale(scale: float) -> float:
    """Return the scale for exp2; a scale of 0 still has to bury hidden scores."""
    assert scale >= 0
    return max(scale, 1e-20) / math.log(2)


def rows_together(tensor: Tensor) -> Tensor:
    """Return the tensor with the values of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of batch, head and token of each tensor."""
    return [tensor.stride(axis) for tensor in tensors for axis in (0, 1, 2)]


def block_size(size: int) -> int:
    """Return the power of two to which heads of `size` values are padded."""
    return max(16, 1 << (size - 1).bit_length())


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which kernels are launched where a tensor lies."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
