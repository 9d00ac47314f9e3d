"""Fixtures of the tests that fine-tune: tiny models of ComfyUI's own classes, and the distillation nodes on them."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SIZES = {"flux": (1, 16, 8, 12), "wan": (1, 16, 2, 8, 8)}
QUICK = {"block_updates": 2, "updates": 3, "rank": 4, "map_rate": 5e-3, "delta_rate": 1e-3, "accumulation": 1,
         "warmup": 1, "held_out": 2, "ema": 0.0, "preset": "ours"}  # fmt: skip


@pytest.fixture(scope="module")
def studios(comfy):
    """Everything a person does with nodes, on a tiny FLUX and a tiny Wan, as the tests of the nodes have it."""
    path = Path(__file__).parents[1] / "nodes" / "conftest.py"
    spec = importlib.util.spec_from_file_location("nodes_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"flux": (64, (16, 24)), "wan": (4096, (3, 8, 10))}
    return {name: module.make_studio(comfy, name, *size) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


@pytest.fixture
def lab(comfy, studios, folders, monkeypatch):
    """What a person does with the distillation nodes, with ComfyUI's output folder elsewhere."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folders))
    shown, patching = [], studios["flux"].patching
    monkeypatch.setattr(comfy.module("nodes.node_status"), "show_on_node", lambda *_: shown.append)
    specs, candidates = comfy.module("attention.specs"), comfy.module("attention.students.candidates")
    student_module = comfy.module("attention.students.learned")

    def samples(name):
        used, shape = studios[name], SIZES[name]
        inputs = {"model": used.model, "latent_image": {"samples": torch.zeros(shape)}, "steps": 2, "name": name,
                  "prompts": ""}  # fmt: skip
        if name == "wan":
            inputs |= {"cfg": 3.0, "negative": used.condition("b")}
        schema = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeTeacherSamples"].define_schema()
        defaults = {each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None}
        values = {key: [value] for key, value in {**defaults, **inputs}.items()}
        values["positive"] = [used.condition(text) for text in "abcdefgh"]
        with torch.inference_mode():
            return comfy.node("LinearizeTeacherSamples")(**values).args[0]

    def student(name, spec, count=1):
        host, module = patching.host_of(studios[name].model)
        found = {}
        for site in host.sites(module):
            parameters = {}
            if isinstance(spec, specs.MappedSpec):
                for part, each in zip(("phi_q", "phi_k"), student_module.new_maps(spec, site.num_heads, site.head_dim),
                                      strict=True):  # fmt: skip
                    parameters |= {f"{part}.{key}": value.detach() for key, value in each.named_parameters()}
            found[site.id] = tuple(candidates.Candidate(spec, 1.0 + i, parameters) for i in range(count))
        return candidates.Candidates(host.name, found)

    def finetune(model, given, of, **inputs):
        with torch.inference_mode():
            return comfy.node("LinearizeFinetune")(model=model, student=given, samples=of, **{**QUICK, **inputs}).args

    return SimpleNamespace(
        samples=samples, student=student, finetune=finetune, shown=shown, specs=specs, candidates=candidates,
        module=comfy.module, node=comfy.node, jobs=folders / "linearize" / "jobs",
        models=studios,
    )  # fmt: skip
