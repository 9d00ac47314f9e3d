"""Every shipped workflow against a real server: schema, validation, comfy-lint; FLUX.1's run on the demo's model.

The templates of other hosts run in test_hosts.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "lab" / "demo" / "api" / "clear_demo.json"
OTHER_DEMOS = [
    ROOT / "lab" / "demo" / "api" / f"{name}.json"
    for name in ("foveated_demo", "calibrate_demo", "distill_demo", "distill_clips")
]
SERVED = ROOT / "lab" / "demo" / "nodes" / "workflows" / "api" / "side_by_side.json"
TEMPLATES = sorted((ROOT / "workflows" / "api").glob("*.json"))
DISTILL = ROOT / "workflows" / "api" / "flux_dev_distill.json"  # runs in test_distill_templates.py
FLUX_TEMPLATES = [path for path in TEMPLATES if re.match("flux_(dev|schnell)", path.stem) and path != DISTILL]
ROW = "COMFY_AUTOGROW_V3"
CODEC = re.compile(r"(format\.)?codec(\..+)?")  # of SaveVideo, inside `format` since ComfyUI 0.34
REFUSALS = {"image": "custom_validation_failed"}  # of an input's own check
SMALLER = 8  # templates run at an eighth of their width and height


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def is_file(value):
    return isinstance(value, str) and value.endswith((".safetensors", ".png"))


def core_files(workflow):
    """Return (node id, input name) of the files of models and pictures that ComfyUI's own loaders name."""
    loaders = {key: node for key, node in workflow.items() if not node["class_type"].startswith("Linearize")}
    return {(key, name) for key, node in loaders.items() for name, value in node["inputs"].items() if is_file(value)}


def refused(live, server, workflow):
    """Return (node id, input name, kind of error) of all that the server's validation refuses; nothing runs."""
    with pytest.raises(live.ServerProblem) as problem:
        server.queue(workflow)
    errors = json.loads(str(problem.value))["node_errors"]
    return {
        (key, error["extra_info"]["input_name"], error["type"]) for key in errors for error in errors[key]["errors"]
    }


def sockets_of(info, inputs):
    """Return the inputs that a node requires, and all that it has, with those that a choice or a row of them brings."""
    required, known = dict(info["input"].get("required", {})), dict(info["input"].get("optional", {}))
    for name, socket in list(required.items()):
        if socket[0] == "COMFY_DYNAMICCOMBO_V3":
            (chosen,) = (option for option in socket[1]["options"] if option["key"] == inputs[name])
            required |= {f"{name}.{each}": value for each, value in chosen["inputs"].get("required", {}).items()}
            known |= {f"{name}.{each}": value for each, value in chosen["inputs"].get("optional", {}).items()}
        if socket[0] == ROW:  # as many sockets of one type as are used
            grown = socket[1]["template"]
            (value,) = (value for kind in grown["input"].values() for value in kind.values())
            del required[name]
            names = [f"{name}.{grown['prefix']}{number}" for number in range(grown["max"])]
            required |= dict.fromkeys(names[: grown["min"]], value)
            known |= dict.fromkeys(names, value)
    known = required | known
    if info["name"] == "SaveVideo":  # cores take the old name of this input too
        required = {name: value for name, value in required.items() if not CODEC.fullmatch(name)}
    return required, known


@pytest.mark.parametrize("path", [*TEMPLATES, DEMO, *OTHER_DEMOS, SERVED], ids=lambda path: path.stem)
def test_api_workflows_fit_object_info(server, path, tmp_path):
    """Every node exists, every input is known, every link has the type its socket wants; comfy-lint agrees."""
    workflow, known = load(path), server.get("/object_info")
    for name, node in workflow.items():
        info = known[node["class_type"]]
        required, sockets = sockets_of(info, node["inputs"])
        assert set(required) <= set(node["inputs"]) <= set(sockets), (name, node["class_type"])
        for each, value in node["inputs"].items():
            if isinstance(value, list):
                given = known[workflow[value[0]]["class_type"]]["output"][value[1]]
                assert {given, "*"} & set(sockets[each][0].split(",")), (name, each)
                sockets[each][0] = given if "," in sockets[each][0] else sockets[each][0]
        # the linter knows neither sockets of several types nor inputs that a choice or a row brings along
        info["input"]["optional"] = {**sockets, **info["input"].get("optional", {})}
        kept = info["input"].get("required", {})
        info["input"]["required"] = {each: socket for each, socket in kept.items() if socket[0] != ROW}
    # the files of the template are not on this machine, so their names are made known to the linter
    for key, name in core_files(workflow):
        socket = known[workflow[key]["class_type"]]["input"]["required"][name]
        options = socket[0] if isinstance(socket[0], list) else socket[1]["options"]
        options.append(workflow[key]["inputs"][name])
    info_file = tmp_path / "object_info.json"
    info_file.write_text(json.dumps(known), encoding="utf-8")
    lint = Path(sys.executable).with_name("comfy-lint")
    if not lint.exists():
        lint = Path(shutil.which("comfy-lint") or lint)
    command = [str(lint), str(path), "--schema-cache", str(info_file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_server_misses_only_the_files(server, live, path):
    """Files get names that nobody has, so that the server refuses those, and would name anything else."""
    workflow = load(path)
    files = core_files(workflow)
    for key, name in files:
        workflow[key]["inputs"][name] = f"nobody has {workflow[key]['inputs'][name]}"
    missing = {(key, name, REFUSALS.get(name, "value_not_in_list")) for key, name in files}
    assert refused(live, server, workflow) == missing
    settings = (("keep", "backend"), ("radius", "weights"), ("kind.rate", "kind.feature_map"), ("steps", "target"))
    small, unknown = next(pair for pair in settings if any(pair[0] in node["inputs"] for node in workflow.values()))
    key = next(key for key, node in workflow.items() if small in node["inputs"])
    wrong = {(key, small, "value_smaller_than_min"), (key, unknown, "value_not_in_list")}
    if unknown == "target":  # the core lets any choice pass; test_calibrate.py sees that the node does not
        wrong.discard((key, unknown, "value_not_in_list"))
    workflow[key]["inputs"] |= {small: 0, unknown: "nobody"}
    assert refused(live, server, workflow) == missing | wrong


def on_the_demo_model(workflow):
    """Return a template with the demo's model, autoencoder and caption, without its LoRA, small and quick."""
    demo = {node["class_type"]: node for node in load(DEMO).values()}
    stand_ins = {
        "UNETLoader": demo["UNETLoader"],
        "VAELoader": demo["VAELoader"],
        "CLIPTextEncode": demo["LinearizeDemoCaption"],
    }
    changed, moved = {}, {}
    for key, node in workflow.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind == "LoraLoaderModelOnly":
            moved[key] = inputs["model"]
        for name in ("width", "height"):
            if isinstance(inputs.get(name), int):
                inputs[name] //= SMALLER
        if "steps" in inputs:
            inputs["steps"] = 4
        if kind == "LinearizeCLEAR":
            inputs.update(radius=2, weights="none", min_tokens=0)
        if kind not in ("DualCLIPLoader", "LoraLoaderModelOnly"):
            changed[key] = stand_ins.get(kind, {"class_type": kind, "inputs": inputs})
    for node in changed.values():
        node["inputs"] = {
            name: moved.get(value[0], value) if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
    return changed


@pytest.mark.parametrize("path", FLUX_TEMPLATES, ids=lambda path: path.stem)
def test_a_template_runs_on_the_demo_model(server, path):
    workflow = on_the_demo_model(load(path))
    (report,) = (key for key, node in workflow.items() if node["class_type"] == "LinearizeReport")
    outputs = server.run(workflow)
    ran = outputs[report]["text"][0].partition("\n\nplanned:")[0]
    if "calibrate" not in path.stem:  # so small a picture may be fastest dense
        assert re.search(r"^clear \(\w+\): \d+ sites$", ran, re.MULTILINE) and "of the calls" not in ran, ran
    (save,) = (key for key, node in workflow.items() if node["class_type"] == "SaveImage")
    assert len(outputs[save]["images"]) == 1
