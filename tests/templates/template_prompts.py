"""A template's prompt made fit for tiny models: what needs a file is given, what is large is made small.

Kept are the nodes between the loaders and the samplers. Behind every loader of a model stands CLEAR, before LoRAs and
everything else, as one would put it there; not where the template has a node of ours itself.
"""

import copy
import importlib.util
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from template_models import Tiny, family_of

Prompt = dict[str, dict[str, Any]]

PACKAGE = "comfyui_workflow_templates_json"
MUTED, BYPASSED = 2, 4  # modes of a node in the interface's form
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
MODEL_LOADERS = ("UNETLoader", "CheckpointLoaderSimple", "ImageOnlyCheckpointLoader")
GIVEN = {  # what reads a file or runs a network of its own: each output is given, by its type
    "CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "QuadrupleCLIPLoader", "LTXAVTextEncoderLoader", "VAELoader",
    "LTXVAudioVAELoader", "CLIPVisionLoader", "ControlNetLoader", "ModelPatchLoader", "StyleModelLoader",
    "AudioEncoderLoader", "AudioEncoderEncode", "LoadImage", "LoadVideo", "LoadAudio", "Painter", "TextGenerate",
    "TextGenerateLTX2Prompt", "DA3Render", "MoGeRender", "SAM3_Detect", "SCAIL2ColoredMask", "VOIDWarpedNoise",
    *MODEL_LOADERS,
}  # fmt: skip
PASSED = {  # what would make things large, or needs a file to change them: output and the input that it passes on
    "FluxKontextImageScale": {0: "image"},
    "ImageUpscaleWithModel": {0: "image"},
    "Video Slice": {0: "video"},
    "AnimaLLLiteApply": {0: "model"},
}
OURS = "Linearize"
CLEAR = {"radius": 2, "weights": "none", "min_tokens": 0}
AT_MOST = {  # inputs by name, and the largest number for a tiny model
    "width": 192, "height": 128, "target_width": 192, "target_height": 128, "largest_size": 192, "longer_edge": 192,
    "longer_size": 192, "shorter_size": 128, "megapixels": 0.0234, "resolution": 192, "length": 9, "num_frames": 9,
    "frames_number": 9, "video_frames": 9, "amount": 9, "ref_max_size": 192, "left": 64, "right": 64,
    "top": 64, "bottom": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is run of a template: all samplers of one family.

    Args:
        family: the models that its samplers run.
        prompt: what ComfyUI executes.
        samplers: ids of the nodes whose outputs are asked for.
    """

    family: Tiny
    prompt: Prompt
    samplers: tuple[str, ...]


def convert(python: Path, nodes: Mapping[str, Any], folder: Path, work: Path) -> dict[str, Prompt]:
    """Return the prompt of every template in `folder`, converted by comfy-cli."""
    described, result = work / "nodes.json", work / "prompts.json"
    described.write_text(json.dumps(nodes, default=str), encoding="utf-8")
    script = Path(__file__).with_name("convert_templates.py")
    subprocess.run([str(part) for part in (python, script, described, folder, result)], check=True, capture_output=True)
    return json.loads(result.read_text(encoding="utf-8"))


def template_folder() -> Path | None:
    """Return where the installed package has its templates."""
    package = importlib.util.find_spec(PACKAGE)
    return Path(package.submodule_search_locations[0]) / "templates" if package else None


def served_templates() -> list[str]:
    """Return the names of the installed templates that load a model of a served family and sample something."""
    folder, found = template_folder(), []
    for path in sorted(folder.glob("*.json")) if folder else ():
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if "nodes" in workflow:
            parts = (workflow, *(workflow.get("definitions") or {}).get("subgraphs", ()))
            nodes = [node for part in parts for node in part["nodes"] if node.get("mode", 0) not in (MUTED, BYPASSED)]
            files = [str(next(iter(node["widgets_values"]))) for node in nodes if node["type"] in MODEL_LOADERS]
            if any(family_of(file) for file in files) and any(node["type"] in SAMPLERS for node in nodes):
                found.append(path.stem)
    return found


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def links_of(node: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield (input, source, output) of every link into a node."""
    for name, value in node["inputs"].items():
        if is_link(value):
            yield name, value[0], value[1]


def upstream(prompt: Prompt, places: Iterable[str]) -> Prompt:
    """Return the part of a prompt that these nodes need."""
    needed, waiting = {}, list(places)
    while waiting:
        place = waiting.pop()
        if place not in needed:
            needed[place] = prompt[place]
            waiting += [source for _, source, _ in links_of(prompt[place])]
    return needed


def model_file(node: Mapping[str, Any]) -> str:
    return str(node["inputs"].get("unet_name") or node["inputs"].get("ckpt_name") or "")


class Template:
    """A template's prompt, and what the nodes in it take and give."""

    def __init__(self, prompt: Prompt, nodes: Mapping[str, Any]) -> None:
        self.prompt = prompt
        self.nodes = nodes

    def runs(self) -> list[Run]:
        """Return a run for each family that the template samples."""
        groups: dict[str, tuple[Tiny, list[str]]] = {}
        for sampler, node in self.prompt.items():
            if node["class_type"] in SAMPLERS:
                for family in self.families(sampler)[:1]:
                    groups.setdefault(family.files, (family, []))[1].append(sampler)
        return [Run(family, self.fitted(samplers), tuple(samplers)) for family, samplers in groups.values()]

    def families(self, sampler: str) -> list[Tiny]:
        """Return the families of the models that a sampler runs; a switch between models has several."""
        seen, waiting, found = set(), [sampler], []
        while waiting:
            place = waiting.pop()
            if place in seen or place not in self.prompt:
                continue
            seen.add(place)
            node = self.prompt[place]
            if node["class_type"] in MODEL_LOADERS:
                family = family_of(model_file(node))
                found += [family] if family else []
                continue
            for name, source, _ in links_of(node):
                declared = str(self.input_type(node, name))
                if declared in ("MODEL", "GUIDER") or "MATCHTYPE" in declared:
                    waiting.append(source)
        return found

    def input_type(self, node: Mapping[str, Any], name: str) -> Any:
        """Return the type of an input, "" for one that only a chosen option has."""
        described = self.nodes.get(node["class_type"], {}).get("input", {})
        for section in ("required", "optional"):
            if name in described.get(section, {}):
                return described[section][name][0]
        return ""

    def output_type(self, source: str, output: int, node: Mapping[str, Any], name: str) -> str:
        """Return the type of an output; one of a node that is not ComfyUI's own has that of the input it goes to."""
        described = self.nodes.get(self.prompt[source]["class_type"])
        return str(described["output"][output] if described else self.input_type(node, name))

    def fitted(self, samplers: list[str]) -> Prompt:
        """Return the prompt with what tiny models need; samplers of other families pass their latent on."""
        fitted = copy.deepcopy(self.prompt)
        for place in self.prompt:
            self._relink(fitted, place, samplers)
        for place in self.prompt:
            self._shrink(fitted, place)
        return upstream(fitted, samplers)

    def _relink(self, fitted: Prompt, place: str, samplers: list[str]) -> None:
        node = fitted[place]
        for name, source, output in list(links_of(node)):
            origin = self.prompt.get(source)
            if origin is None:
                continue
            while (passed := self._passed(source, output, samplers)) is not None:
                source, output = passed
                origin = self.prompt[source]
            node["inputs"][name] = [source, output]
            if origin["class_type"] in GIVEN or origin["class_type"] not in self.nodes:
                node["inputs"][name] = self._given(fitted, source, output, node, name)

    def _passed(self, source: str, output: int, samplers: list[str]) -> tuple[str, int] | None:
        origin = self.prompt[source]
        name = PASSED.get(origin["class_type"], {}).get(output)
        if origin["class_type"] in SAMPLERS and source not in samplers:
            name = "latent_image"
        link = origin["inputs"].get(name) if name else None
        return (link[0], link[1]) if is_link(link) else None

    def _given(self, fitted: Prompt, source: str, output: int, node: Mapping[str, Any], name: str) -> Any:
        kind = self.output_type(source, output, node, name)
        if name == "audio_vae":
            kind = "AUDIO_VAE"
        if name in AT_MOST:
            return AT_MOST[name]
        if kind == "MODEL":
            loader = {"class_type": "GivenModel", "inputs": {"file": model_file(self.prompt[source])}}
            fitted.setdefault(f"model {source}", loader)
            if any(each["class_type"].startswith(OURS) for each in self.prompt.values()):
                return [f"model {source}", 0]
            inputs = {**self.defaults("LinearizeCLEAR"), **CLEAR, "model": [f"model {source}", 0]}
            clear = {"class_type": "LinearizeCLEAR", "inputs": inputs}
            fitted.setdefault(f"clear {source}", clear)
            return [f"clear {source}", 0]
        fitted.setdefault(f"given {kind}", {"class_type": "Given", "inputs": {"kind": kind}})
        return [f"given {kind}", 0]

    def defaults(self, name: str) -> dict[str, Any]:
        """Return what the inputs of a node are by themselves."""
        described = self.nodes[name]["input"]
        options = {key: each[1] for part in described.values() for key, each in part.items() if len(each) > 1}
        return {key: each["default"] for key, each in options.items() if "default" in each}

    def _shrink(self, fitted: Prompt, place: str) -> None:
        node = fitted[place]
        inputs = node["inputs"]
        if node["class_type"] == "KSampler":
            inputs["steps"] = 2
        elif node["class_type"] == "KSamplerAdvanced":
            first, rest = inputs["start_at_step"] == 0, inputs["return_with_leftover_noise"] == "enable"
            inputs.update(steps=2, start_at_step=0 if first else 1, end_at_step=1 if first and rest else 10000)
        elif node["class_type"] == "LTXVLatentUpsampler":
            upscale = {"samples": inputs["samples"], "upscale_method": "bilinear", "scale_by": 2.0}
            fitted[place] = {"class_type": "LatentUpscaleBy", "inputs": upscale}
        elif node["class_type"] in ("LoraLoader", "LoraLoaderModelOnly"):
            kept = {name: inputs[name] for name in ("model", "clip", "strength_model") if name in inputs}
            fitted[place] = {"class_type": "GivenLoRA", "inputs": kept}
        elif node["class_type"] == "ComfyMathExpression":  # the converter loses some of its numbers
            for letter in set(re.findall(r"\b[a-z]\b", inputs["expression"])):
                inputs.setdefault(f"values.{letter}", 1)
        elif node["class_type"] == "ComfySwitchNode":  # and texts that a subgraph shows outside
            inputs.setdefault("on_true", "")
            inputs.setdefault("on_false", "")
        for name, value in list(inputs.items()):
            if self.input_type(node, name) in ("IMAGE", "MASK") and not is_link(value):
                del inputs[name]  # the converter's slip
            if name == "sigmas" and node["class_type"] in SAMPLERS:
                fitted[f"few {place}"] = {"class_type": "FewSteps", "inputs": {"sigmas": value}}
                inputs[name] = [f"few {place}", 0]
            limit = AT_MOST.get(name.rpartition(".")[2])
            if limit is None:
                continue
            if is_link(value):
                fitted[f"{name} {place}"] = {"class_type": "AtMost", "inputs": {"value": value, "limit": limit}}
                inputs[name] = [f"{name} {place}", 0]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                inputs[name] = min(value, limit)
