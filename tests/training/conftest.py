"""The toy models of this folder, and Triton's interpreter where there is no GPU."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nobody did yet
FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from finetune_lab import folders, lab, studios  # noqa: E402, F401


@pytest.fixture(scope="session")
def interpreter():
    """Triton, compiled on a GPU and interpreted elsewhere, where it is installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    spec = importlib.util.spec_from_file_location("kernels_conftest", FOLDER.parent / "kernels" / "conftest.py")
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    if not kernels.ON_GPU:
        kernels.let_scalars_be_indices()
