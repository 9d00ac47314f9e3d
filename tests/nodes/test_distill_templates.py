"""What the notes of the templates that distil claim of memory and budget, by the nodes' own arithmetic.

The models have their real sizes and no weights.
"""

import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "workflows" / "api"
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
WAN = {
    "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30,
}  # fmt: skip


@pytest.fixture
def models(comfy):
    """Functions that make each template's model, as its file stores it."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.wan.model import WanModel

    common = {"device": "meta", "operations": comfy.ops.disable_weight_init}
    return {
        "flux_dev_distill": lambda: Flux(**FLUX, **common, dtype=torch.float8_e4m3fn),
        "wan21_t2v_distill": lambda: WanModel(**WAN, **common, dtype=torch.float16),
    }


def inputs_of(nodes, kind):
    return [node["inputs"] for node in nodes.values() if node["class_type"] == kind]


def candidates(comfy, nodes):
    """Return the specs that the template's plans give every site."""
    found = []
    for inputs in inputs_of(nodes, "LinearizeUniformPlan"):
        kind = {name.removeprefix("kind."): value for name, value in inputs.items() if name.startswith("kind")}
        assert inputs["sites"] == "all"
        found.append(comfy.module("attention.spec_json").spec_from_json(kind))
    return found


def map_parameters(comfy, spec, site):
    """Return how many parameters the maps of a site have, and the matrix behind it."""
    learned = 0
    if spec.has_maps:
        make = comfy.module("attention.kinds.feature_maps").MAPS[spec.feature_map]
        learned = 2 * sum(each.numel() for each in make(site.num_heads, site.head_dim, spec.feature_dim).parameters())
    return learned + site.num_heads * site.head_dim**2


@pytest.mark.parametrize(
    ("name", "claim"),
    {
        "flux_dev_distill": (
            "needs about 17.6 GiB: model 11.1 GiB, trained weights 4.0 GiB, activations 2.5 GiB",
            "estimates 18 GiB with these settings if every site gets feature maps: model 11.1, trained weights 4.0, "
            "activations 2.5",
        ),
        "wan21_t2v_distill": (
            "needs about 6.9 GiB: model 2.6 GiB, trained weights 1.9 GiB, activations 2.4 GiB",
            "estimates 7 GiB with these settings if every block is hybrid: model 2.6, trained weights 1.9, "
            "activations 2.4",
        ),
    }.items(),
)
def test_the_note_says_what_fine_tuning_estimates(comfy, models, name, claim):
    """With the largest candidate at every site, and a change of weights at all of its projections."""
    nodes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (tune,), (teacher,) = inputs_of(nodes, "LinearizeFinetune"), inputs_of(nodes, "LinearizeTeacherSamples")
    module = models[name]()
    host = next(
        each for each in comfy.module("attention.hosts").HOSTS if each.name == name.split("_")[0].removesuffix("21")
    )
    sites, weights = host.sites(module), host.site_weights(module)
    sizes = comfy.module("training.finetune.deltas").projections(
        module, (path for each in sites for path in weights[each.id])
    )
    trained = sum(tune["rank"] * (rows + columns) for rows, columns in sizes.values())
    trained += max(sum(map_parameters(comfy, spec, each) for each in sites) for spec in candidates(comfy, nodes))
    latent = nodes[teacher["latent_image"][0]]["inputs"]
    size = latent["width"], latent["height"], latent.get("length", 1)
    parameters = list(module.parameters())
    found = comfy.module("training.finetune.estimate").estimate(
        sum(each.nbytes for each in parameters),
        trained,
        optimizer=tune["optimizer"],
        has_average=tune["ema"] > 0,
        num_tokens=host.planned_layout(module, *size, host.default_text_tokens).num_tokens,
        width=sites[0].num_heads * sites[0].head_dim,
        num_blocks=len(sites),
        checkpointing=tune["checkpointing"],
        num_cast=sum(each.numel() for each in parameters),
    )
    text, words = claim
    assert found.text() == text
    assert words in (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def share(comfy, host, module, specs, size):
    """Return the FLOPs of attention with a spec per site over those of dense attention, at a size."""
    cost, dense = comfy.module("attention.planning.cost").attention_cost, comfy.module("attention.specs").DenseSpec()
    layout = host.planned_layout(module, *size, host.default_text_tokens)
    flops = [0, 0]
    for site, spec in zip(host.sites(module), specs, strict=True):
        own = host.site_layout(site.id, layout)
        for index, each in enumerate((spec, dense)):
            flops[index] += cost(each, own, site.num_heads, site.head_dim).flops
    return flops[0] / flops[1]


@pytest.mark.parametrize("name", ["flux_dev_distill", "wan21_t2v_distill"])
def test_the_budget_can_be_reached_and_is_what_the_note_says(comfy, models, name):
    """The cheapest candidate everywhere costs less, and Wan's budget is that of 15 of 30 blocks at rate 2."""
    nodes, module = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), models[name]()
    host = next(
        each for each in comfy.module("attention.hosts").HOSTS if each.name == name.split("_")[0].removesuffix("21")
    )
    (budget,) = inputs_of(nodes, "LinearizeBudgetPlan")
    size, sites = (budget["width"], budget["height"], budget["frames"]), host.sites(module)
    specs = candidates(comfy, nodes)
    assert min(share(comfy, host, module, [spec] * len(sites), size) for spec in specs) < budget["budget"]
    if host.name == "wan":
        half = [specs[0]] * 15 + [comfy.module("attention.specs").DenseSpec()] * 15
        assert specs[0].rate == 2 and budget["budget"] - 0.02 < share(comfy, host, module, half, size)
        assert share(comfy, host, module, half, size) <= budget["budget"]
