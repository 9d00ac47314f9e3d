"""The ComfyUI that `run.py` made: where it and its data lie, and how it is started in this process."""

import asyncio
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from . import ROOT

COMFYUI = Path(os.environ.get("LINEARIZE_COMFYUI", ROOT / ".comfyui" / "comfyui"))
BASE = Path(os.environ.get("LINEARIZE_BASE", ROOT / ".comfyui" / "base"))
PACKS = (ROOT, ROOT / "lab" / "demo" / "nodes")  # what ComfyUI loads as custom nodes
MODELS = {"linearize_lake_flux.safetensors": "diffusion_models", "linearize_lake_vae.safetensors": "vae",
          "linearize_clips_wan.safetensors": "diffusion_models"}  # fmt: skip
SETTINGS = {  # of the interface, for whoever opens it first: no first-run dialogs, and nodes that draw sliders
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.47.12",
    "Comfy.VueNodes.Enabled": True,
}


def prepare_base() -> None:
    """Put the demo's models and the interface's settings where ComfyUI looks for them."""
    for name, folder in MODELS.items():
        source, target = ROOT / "lab" / "models" / name, BASE / "models" / folder / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    write_settings(BASE / "user")


def write_settings(users: Path, **changes: Any) -> None:
    """Write the interface's settings, and `changes` to them, into a folder of users that has none yet."""
    settings = users / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps({**SETTINGS, **changes}), encoding="utf-8")


def start(on_cpu: bool) -> Any:
    """Start ComfyUI in this process with the pack and the demo's nodes; return its module `nodes`.

    Raises:
        RuntimeError: ComfyUI could not load one of the packs.
    """
    from linearize.training.comfyui.setup import prepare  # imports torch, which the client of a server does without

    prepare_base()
    prepare(COMFYUI, on_cpu=on_cpu)
    importlib.import_module("comfy.cli_args").args.base_directory = str(BASE)
    nodes = importlib.import_module("nodes")
    for folder in PACKS:
        if not asyncio.run(nodes.load_custom_node(str(folder), module_parent="custom_nodes")):
            raise RuntimeError(f"ComfyUI could not load {folder}")
    return nodes


def module(name: str) -> Any:
    """Return a module of the pack as ComfyUI loaded it."""
    return importlib.import_module(f"{str(ROOT).replace('.', '_x_')}.{name}")
