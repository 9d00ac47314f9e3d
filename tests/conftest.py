"""Shared by all tests: the importable name of the checkout, poisoned memory, error measures, ComfyUI in-process."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = (  # linearize_tiny_*.safetensors
    "flux", "flux2", "wan", "wan_low", "wan_i2v", "wan_i2v_low", "vace", "sd3", "hunyuan_video", "ltx",
)  # fmt: skip

os.environ.setdefault("LINEARIZE_STRICT", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# ComfyUI has a nodes.py; with the checkout on the path its nodes/ folder would be found instead
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

if importlib.util.find_spec("linearize") is None:  # a plain checkout without the editable install
    spec = importlib.util.spec_from_file_location(
        "linearize", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["linearize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["linearize"])

import torch  # noqa: E402

from linearize.lab import comfyui  # noqa: E402

if os.environ.get("LINEARIZE_TEST_DEVICE"):  # the oracle tests on a card: see lab/benchmarks/gpu.md
    torch.set_default_device(os.environ["LINEARIZE_TEST_DEVICE"])

# error against float64, as the Frobenius norm of the difference over that of the truth
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(scope="session")
def tolerance():
    """Relative errors that are accepted, by dtype."""
    return TOLERANCE


@pytest.fixture(scope="session")
def relative_error():
    """A function: relative Frobenius error of a result against the truth."""

    def measure(result, truth):
        assert result.shape == truth.shape
        result, truth = result.detach().double(), truth.detach().double()
        return float((result - truth).norm() / truth.norm().clamp_min(1e-30))

    return measure


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN, so that an output row nobody wrote fails loudly."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI in this process with the pack loaded by its own loader: `.nodes`, `.node(id)`, `.module(name)`."""
    if not (comfyui.COMFYUI / "nodes.py").exists():
        pytest.skip("no ComfyUI here; run the tests with: python run.py test")
    nodes = comfyui.start(on_cpu=True)
    comfyui.module("patching.install").SecondsFile = lambda: None  # what a run leaves must not change the next one
    writers = load_file(ROOT / "tests" / "tiny_models.py")
    for name in TINY:
        path = comfyui.BASE / "models" / "diffusion_models" / f"linearize_tiny_{name}.safetensors"
        if not path.exists():
            getattr(writers, f"write_tiny_{name}")(path)

    def node(node_id):
        """Return a function that runs a node with keyword inputs and gives its outputs, defaults filled in."""
        cls = nodes.NODE_CLASS_MAPPINGS[node_id]
        defaults = {i.id: i.default for i in cls.define_schema().inputs if getattr(i, "default", None) is not None}
        defaults |= {"min_tokens": 0} if "min_tokens" in defaults else {}  # tiny models pay nowhere
        prepared = cls.PREPARE_CLASS_CLONE(None)
        return lambda **inputs: prepared.EXECUTE_NORMALIZED(**{**defaults, **inputs})

    return SimpleNamespace(nodes=nodes, node=node, module=comfyui.module)


@pytest.fixture(scope="session")
def packed_models(comfy):
    """What writes and loads copies of the tiny models whose weights are stored packed."""
    return load_file(ROOT / "tests" / "packed_models.py")


def load_file(path: Path):
    """Import a file that is not part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
