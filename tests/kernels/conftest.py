"""Kernels run in Triton's interpreter where there is no GPU; on one they are compiled, and the `gpu` tests run too."""

import importlib.util
import os

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nobody did yet


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def device():
    """Where kernels run: a GPU, or the CPU under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not ON_GPU:
        let_scalars_be_indices()
    return torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


def let_scalars_be_indices():
    """Triton 3.6's interpreter holds scalars as arrays of one value, which NumPy 2.4 no longer takes as numbers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if tuple(map(int, np.__version__.split(".")[:2])) < (2, 4) or patch.__module__ == __name__:
        return

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


@pytest.fixture(scope="session")
def exact_dtype():
    """The most exact dtype that the kernels take here."""
    return torch.float16 if ON_GPU else torch.float32


@pytest.fixture
def trusted(monkeypatch):
    """Skip the kernels' test of themselves, which takes seconds in the interpreter for each dtype and head size."""
    from linearize.attention.gpu.self_test import SelfTest

    monkeypatch.setattr(SelfTest, "run", lambda test, case: None)
