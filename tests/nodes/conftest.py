"""The tiny models through ComfyUI's own loader and sampler, and what the run record must say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture(scope="session")
def studio(comfy):
    """Everything a person does with nodes, on FLUX."""
    return make_studio(comfy, "flux", 64, (16, 24))


@pytest.fixture(scope="session")
def wan(comfy):
    """The same on Wan."""
    return make_studio(comfy, "wan", 4096, (3, 8, 10))


@pytest.fixture(scope="session")
def vace(comfy):
    """The same on Wan with VACE blocks."""
    return make_studio(comfy, "vace", 4096, (3, 8, 10))


@pytest.fixture(scope="session")
def sd3(comfy):
    """The same on Stable Diffusion 3.5."""
    return make_studio(comfy, "sd3", 4096, (16, 24), pooled_width=2048)


def make_studio(comfy, name, text_width, default_size, pooled_width=32):
    """Return what loads, conditions, patches, samples and reads the record of one tiny model."""
    patching = comfy.module("patching")
    runtime_module = comfy.module("attention.runtime.runtime")
    with torch.inference_mode():
        (model,) = comfy.nodes.UNETLoader().load_unet(f"linearize_tiny_{name}.safetensors", "default")

    def condition(text="a", tokens=12):
        generator = torch.Generator().manual_seed(sum(text.encode()))
        tensor = torch.randn(1, tokens, text_width, generator=generator)
        return [[tensor, {"pooled_output": torch.randn(1, pooled_width, generator=generator)}]]

    def clear(model, **inputs):
        with torch.inference_mode():
            return comfy.node("LinearizeCLEAR")(model=model, **inputs)[0]

    def sample(model, *, size=default_size, cfg=1.0, positive=None, negative=None, steps=2, seed=3):
        empty = {"samples": torch.zeros(1, 16, *size)}
        positive, negative = positive or condition(), negative or condition("b")
        with torch.inference_mode():
            (out,) = comfy.nodes.KSampler().sample(
                model, seed, steps, cfg, "euler", "simple", positive, negative, empty, 1.0
            )
        return out["samples"]

    def ran(model):
        """Return {site: (kind, backend)} of the last run; a site that ran two ways is an error."""
        record = patching.runtime_of(model).record
        found = {}
        for each in record.ran:
            assert each.site not in found, f"{each.site} ran two ways"
            found[each.site] = (each.kind, each.backend)
        return found

    return SimpleNamespace(
        model=model,
        condition=condition,
        clear=clear,
        sample=sample,
        ran=ran,
        patching=patching,
        node_status=comfy.module("nodes.node_status"),
        runtime=runtime_module,
        record=lambda model: patching.runtime_of(model).record,
    )


@pytest.fixture
def everywhere():
    """What the record says when every site ran on clear with backend torch."""
    return dict.fromkeys(SITES, ("clear", "torch"))


@pytest.fixture
def notes(studio, monkeypatch):
    """What each node tells beside the summary, in the order in which they ran."""
    told, show = [], studio.node_status.show_on_node

    def note(node_id, lines=()):
        told.append(" ".join(lines))
        return show(node_id, lines)

    monkeypatch.setattr(studio.node_status, "show_on_node", note)
    return told


@pytest.fixture
def place(comfy):
    """A function that puts tensors into models/linearize or models/diffusion_models, and takes them away at the end."""
    import folder_paths

    made = []

    def put(kind, name, tensors, metadata=None):
        folder = Path(folder_paths.get_folder_paths(kind)[0])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        made.append(path)
        if isinstance(tensors, bytes):
            path.write_bytes(tensors)
        else:
            save_file(tensors, path, metadata)
        return name

    yield put
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def base_tensors(comfy):
    """The checkpoint of the tiny model."""
    import folder_paths

    return load_file(folder_paths.get_full_path("diffusion_models", "linearize_tiny_flux.safetensors"))


@pytest.fixture(scope="session")
def packed_base(comfy, packed_models, tmp_path_factory):
    """A function: the tiny FLUX with its projections packed, as a loader gives it."""
    import folder_paths
    from comfy.sd import load_diffusion_model

    source = Path(folder_paths.get_full_path("diffusion_models", "linearize_tiny_flux.safetensors"))
    folder, loaded = tmp_path_factory.mktemp("packed"), {}

    def load(kind):
        if kind not in loaded:
            with torch.inference_mode():
                if kind == "gguf":
                    loaded[kind] = packed_models.gguf_model(source)
                else:
                    packed_models.write_packed(source, folder / f"{kind}.safetensors", kind)
                    loaded[kind] = load_diffusion_model(str(folder / f"{kind}.safetensors"))
        return loaded[kind]

    return load
