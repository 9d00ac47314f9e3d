"""ComfyUI's own executor in this process, with all of its nodes, and tiny models in place of files."""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests" / "attention" / "hosts", Path(__file__).parent):
    sys.path.append(str(folder))  # files that import each other by name

from stand_ins import NODES, Given, given  # noqa: E402
from template_models import family_of  # noqa: E402
from template_prompts import Run, Template, convert, template_folder  # noqa: E402


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
    order = {key: list(each) for key, each in inputs.items()}
    return {"input": inputs, "input_order": order, "output": cls.RETURN_TYPES}


@pytest.fixture(scope="session")
def templates(descriptions, tmp_path_factory):
    """The official templates of the installed package, by name."""
    folder = template_folder()
    python = ROOT / ".comfyui" / "cli" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if folder is None or not python.exists():
        pytest.skip("no official templates or no comfy-cli here; run the tests with: python run.py test")
    prompts = convert(python, descriptions, folder, tmp_path_factory.mktemp("templates"))
    return {name: Template(prompt, descriptions) for name, prompt in prompts.items()}


@pytest.fixture(scope="session")
def models(core):
    """A function: the tiny model of a family, made once; one for each of several loaders."""
    made = {}

    def model(family, number=0):
        if (family.files, number) not in made:
            made[family.files, number] = family.build()
        return made[family.files, number]

    return model


@pytest.fixture
def execute(core, models, monkeypatch):
    """A function that executes a `Run`, and returns the record and the planned sites of every sampling run in it."""
    import comfy.model_management
    import comfy.model_patcher
    import execution
    from comfy.patcher_extension import CallbacksMP
    from server import PromptServer

    runtime_of = core.module("patching").runtime_of
    server = SimpleNamespace(client_id=None, last_node_id=None)
    server.send_sync = server.send_progress_text = lambda *_: None
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    for cls in NODES:
        monkeypatch.setitem(core.nodes.NODE_CLASS_MAPPINGS, cls.__name__, cls)

    def execute(run: Run):
        runtimes, loaded = {}, Counter()

        def note(patcher):
            runtime = runtime_of(patcher)
            assert runtime is not None, "a model was sampled without the node"
            runtimes[id(runtime.record)] = runtime.record, tuple(runtime.sites)

        def load(file):
            cpu, family = torch.device("cpu"), family_of(file)
            patcher = comfy.model_patcher.ModelPatcher(models(family, loaded[family.files]), cpu, cpu)
            loaded[family.files] += 1
            patcher.add_callback(CallbacksMP.ON_CLEANUP, note)
            return patcher

        sources = given(run.family, models(run.family).latent_format)
        monkeypatch.setattr(Given, "sources", {**sources, "MODEL": load})
        executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, {"ram": 0, "ram_inactive": 0})
        executor.execute(run.prompt, "template", execute_outputs=list(run.samplers))
        comfy.model_management.unload_all_models()  # the next template finds them as they were
        for event, data in executor.status_messages:
            if event == "execution_error":
                trace = "".join(data["traceback"][-4:])
                pytest.fail(f"{data['node_type']}: {data['exception_message'].strip()}\n{trace}", pytrace=False)
        return list(runtimes.values())

    return execute
