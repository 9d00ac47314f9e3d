"""Wan 2.1 1.3B at its real size, with random weights: what tiny models cannot tell of sites, heads and parameters.

About 4 GB of memory; the grid is small, so it takes seconds.
"""

import json
from pathlib import Path

import pytest
import torch

TEMPLATE = Path(__file__).resolve().parents[2] / "workflows" / "api" / "wan21_t2v_hybrid.json"
CONFIG = {
    "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30,
}  # fmt: skip


def random_weights(shapes):
    """Return bf16 weights for a state dict: norms of 1, the rest cut from one sheet of random numbers."""
    sheet = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weights = {}
    for number, (name, tensor) in enumerate(shapes.items()):
        start = 4099 * number % (sheet.numel() - tensor.numel())
        weights[name] = sheet[start : start + tensor.numel()].view(tensor.shape)
        if "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
    return weights


@pytest.fixture
def wan(comfy):
    """A model patcher that ComfyUI's own loader makes of such a state dict."""
    import comfy.model_management
    import comfy.ops
    import comfy.sd
    from comfy.ldm.wan.model import WanModel

    shapes = WanModel(**CONFIG, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    options = {"dtype": torch.bfloat16}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(random_weights(shapes), model_options=options)
    yield model
    comfy.model_management.unload_all_models()  # 2.6 GB


def test_half_of_wan_runs_hybrid(comfy, wan):
    """The sites are those of the shipped template; the feature map is the paper's, with its number of parameters."""
    patching = comfy.module("patching")
    host, module = patching.host_of(wan)
    sites = host.sites(module)
    assert [(site.id, site.num_heads, site.head_dim) for site in sites] == [(f"blocks.{i}", 12, 128) for i in range(30)]
    assert 1.2e9 < sum(parameter.numel() for parameter in module.parameters()) < 1.5e9

    plan = None
    for node in json.loads(TEMPLATE.read_text(encoding="utf-8")).values():
        if node["class_type"] == "LinearizeUniformPlan":
            kind = {name.removeprefix("kind."): value for name, value in node["inputs"].items() if "kind" in name}
            if kind["kind"] == "hybrid":
                assert kind["rate"] == 2
                kind["feature_map"] = "polynomial"
            uniform = comfy.node("LinearizeUniformPlan")
            plan = uniform(kind=kind, sites=node["inputs"]["sites"], host=node["inputs"]["host"], plan=plan)[0]
    text = [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    with torch.inference_mode():
        (patched,) = comfy.node("LinearizeApply")(model=wan, attention=plan).args
        empty = {"samples": torch.zeros(1, 16, 3, 8, 10)}
        (painted,) = comfy.nodes.KSampler().sample(patched, 1, 1, 1.0, "euler", "simple", text, text, empty, 1.0)
    assert painted["samples"].isfinite().all() and painted["samples"].std() > 0.1

    runtime = patching.runtime_of(patched)
    ran = {(each.site, each.kind, each.backend): calls for each, calls in runtime.record.ran.items()}
    hybrid = [f"blocks.{i}" for i in range(8, 23)]
    assert len(hybrid) == 15 and ran == {
        (site.id, *(("hybrid", "torch") if site.id in hybrid else ("dense", "host"))): 1 for site in sites
    }
    assert runtime.record.non_finite == () and not runtime.record.declined
    maps = {site: learned.maps for site, learned in runtime.parameters.by_site().items()}
    assert list(maps) == hybrid
    for pair in maps.values():
        assert [sum(parameter.numel() for parameter in each.parameters()) for each in pair] == [1_185_792] * 2
    (beside,) = patched.get_additional_models_with_key("linearize")
    assert sum(parameter.numel() for parameter in beside.model.parameters()) == 15 * 2_371_584
