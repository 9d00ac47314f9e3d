"""Receipts in what a real server saves: each in the pictures and clips of its own sampling."""

import io
import json
import urllib.request
import uuid
from pathlib import Path

from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "lab" / "demo" / "api" / "clear_demo.json"


def demo(seed=1, radius=4):
    """Return the demo with two branches, windows saved by `save` and the untouched model's picture by `dense`."""
    flow = json.loads(DEMO.read_text(encoding="utf-8"))
    names = {node["class_type"]: name for name, node in flow.items()}
    sampler, clear, save = names["KSampler"], names["LinearizeCLEAR"], names["SaveImage"]
    flow[names["EmptySD3LatentImage"]]["inputs"].update(width=144, height=112)
    flow[sampler]["inputs"].update(steps=1, seed=seed)
    flow[clear]["inputs"]["radius"] = radius
    decode = flow.pop(flow[save]["inputs"]["images"][0])["inputs"]
    for name in (save, names["LinearizeReport"]):
        flow.pop(name)
    plain = {**flow[sampler]["inputs"], "model": flow[clear]["inputs"]["model"]}
    flow["plain"] = {"class_type": "KSampler", "inputs": plain}
    for name, source in (("save", sampler), ("dense", "plain")):
        flow[f"{name} picture"] = {"class_type": "VAEDecode", "inputs": {**decode, "samples": [source, 0]}}
        flow[name] = {"class_type": "SaveImage", "inputs": {"images": [f"{name} picture", 0], "filename_prefix": name}}
    return flow, sampler


def saved(server, outputs, name, kind="images"):
    return server.image(outputs[name][kind][0])


def receipts(server, outputs, name):
    """Return the radii that a saved picture's receipts tell."""
    found = Image.open(io.BytesIO(saved(server, outputs, name))).info.get("linearize", "[]")
    return [spec["radius"] for receipt in json.loads(found) for spec in receipt["plan"]["sites"].values()]


def test_two_branches_and_what_comes_from_the_cache(server):
    flow, _ = demo(seed=101)
    outputs = server.run(flow)
    assert (receipts(server, outputs, "save"), receipts(server, outputs, "dense")) == ([4], [])
    for name in ("save", "dense"):
        flow[name]["inputs"]["filename_prefix"] = f"{name} again"
    outputs = server.run(flow)  # both samplers come from ComfyUI's cache
    assert (receipts(server, outputs, "save"), receipts(server, outputs, "dense")) == ([4], [])
    flow, _ = demo(seed=101, radius=3)
    outputs = server.run(flow)
    assert (receipts(server, outputs, "save"), receipts(server, outputs, "dense")) == ([3], [])


def test_a_sampler_inside_a_node_that_expands(server):
    flow, sampler = demo(seed=102)
    taken = {name: flow[sampler]["inputs"][name] for name in ("model", "positive", "latent_image", "seed")}
    flow[sampler] = {"class_type": "LinearizeTestExpand", "inputs": taken}
    for prefix in ("first", "cached"):
        flow["save"]["inputs"]["filename_prefix"] = prefix
        assert receipts(server, server.run(flow), "save") == [4]


def test_animations_and_clips_carry_their_own_receipts(server):
    flow, _ = demo(seed=103)
    for name in ("save", "dense"):
        picture = flow[name]["inputs"]["images"]
        flow[f"{name} clip"] = {"class_type": "CreateVideo", "inputs": {"images": picture, "fps": 8.0}}
        for end, kind, inputs in (
            ("apng", "SaveAnimatedPNG", {"images": picture, "fps": 8.0, "compress_level": 1}),
            ("webp", "SaveAnimatedWEBP", {"images": picture, "fps": 8.0, "lossless": True, "quality": 80,
                                          "method": "default"}),
            ("webm", "SaveWEBM", {"images": picture, "codec": "vp9", "fps": 8.0, "crf": 32.0}),
            ("mp4", "SaveVideo", {"video": [f"{name} clip", 0], "format": "auto", "codec": "auto"}),
        ):  # fmt: skip
            prefix = {"filename_prefix": f"{name} {end}"}
            flow[f"{name} {end}"] = {"class_type": kind, "inputs": {**inputs, **prefix}}
    outputs = server.run(flow)
    for end in ("apng", "webp", "webm", "mp4"):
        for name, expected in (("save", True), ("dense", False)):
            data = saved(server, outputs, f"{name} {end}")
            assert (b"share_linearized" in data) == expected, f"{name} {end}"


def test_a_long_queue_and_what_clients_send_in_extra_pnginfo(server):
    infos = [None, [], ["linearize"], "text", 7, {}, {"linearize": "mine"}, {"linearize": {"plan": [1]}, "workflow": 3}]
    hard, ids = [], []
    for number in range(62):  # only the first one samples
        flow, _ = demo(seed=1000)
        flow["save"]["inputs"]["filename_prefix"] = f"queued {number}"
        ids.append(server.queue(flow))
    for info in infos:
        body = {"prompt": demo(seed=1000)[0], "extra_data": {"extra_pnginfo": info}, "prompt_id": str(uuid.uuid4())}
        request = urllib.request.Request(
            f"{server.url}/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            hard.append(json.load(answer)["prompt_id"])
    assert server.get("/queue")["queue_pending"], "the queue can be looked at meanwhile"
    assert [receipts(server, server.wait(each), "save") for each in ids] == [[4]] * len(ids)
    for info, prompt_id in zip(infos, hard, strict=True):
        if info is None or isinstance(info, dict):
            outputs = server.wait(prompt_id)
            assert (receipts(server, outputs, "save"), receipts(server, outputs, "dense")) == ([4], [])
