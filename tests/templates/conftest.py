"""ComfyUI's own executor in this process, with all of its nodes, and tiny models in place of files."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests" / "hosts", Path(__file__).parent):
    sys.path.append(str(folder))  # files that import each other by name

from stand_ins import NODES, Given, given  # noqa: E402
from template_models import family_of  # noqa: E402
from template_prompts import Run, Template, convert  # noqa: E402

PACKAGE = "comfyui_workflow_templates_json"


@pytest.fixture(scope="session")
def core(comfy):
    """ComfyUI's nodes, those of `comfy_extras` too."""
    failed = asyncio.run(comfy.nodes.init_builtin_extra_nodes())
    assert set(failed) <= {"nodes_replacements.py"}, failed  # it wants a server, and has no nodes
    return comfy


@pytest.fixture(scope="session")
def descriptions(core):
    """What `/object_info` says of every node."""
    return {name: describe(cls) for name, cls in core.nodes.NODE_CLASS_MAPPINGS.items()}


def describe(cls):
    if hasattr(cls, "GET_NODE_INFO_V1"):
        return cls.GET_NODE_INFO_V1()
    inputs = cls.INPUT_TYPES()
    return {"input": inputs, "input_order": {key: list(each) for key, each in inputs.items()}, "output": cls.RETURN_TYPES}


@pytest.fixture(scope="session")
def templates(descriptions, tmp_path_factory):
    """The official templates of the installed package, by name."""
    package = importlib.util.find_spec(PACKAGE)
    python = ROOT / ".comfyui" / "cli" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if package is None or not python.exists():
        pytest.skip("no official templates or no comfy-cli here; run the tests with: python run.py test")
    folder = Path(package.submodule_search_locations[0]) / "templates"
    prompts = convert(python, descriptions, folder, tmp_path_factory.mktemp("templates"))
    return {name: Template(prompt, descriptions) for name, prompt in prompts.items()}


@pytest.fixture(scope="session")
def models(core):
    """A function: the tiny model of a family, made once."""
    made = {}

    def model(family):
        if family.files not in made:
            made[family.files] = family.build()
        return made[family.files]

    return model


@pytest.fixture
def execute(core, models, monkeypatch):
    """A function that executes a `Run`, and returns the run records and hosts of all sampling runs in it."""
    import comfy.model_patcher
    import execution
    from comfy.patcher_extension import CallbacksMP

    runtime_of = core.module("nodes.patching").runtime_of
    for cls in NODES:
        monkeypatch.setitem(core.nodes.NODE_CLASS_MAPPINGS, cls.__name__, cls)

    def execute(run: Run):
        runtimes = []

        def load(file):
            cpu = torch.device("cpu")
            patcher = comfy.model_patcher.ModelPatcher(models(family_of(file)), cpu, cpu)
            patcher.add_callback(CallbacksMP.ON_CLEANUP, lambda used: runtimes.append(runtime_of(used)))
            return patcher

        sources = given(run.family, models(run.family).latent_format)
        monkeypatch.setattr(Given, "sources", {**sources, "MODEL": load})
        server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
        executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, {"ram": 0, "ram_inactive": 0})
        executor.execute(run.prompt, "template", execute_outputs=list(run.samplers))
        for event, data in executor.status_messages:
            if event == "execution_error":
                trace = "".join(data["traceback"][-4:])
                pytest.fail(f"{data['node_type']}: {data['exception_message']}\n{trace}", pytrace=False)
        return runtimes

    return execute
