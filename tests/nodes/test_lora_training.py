"""ComfyUI's own LoRA training on a linearized model: every kind runs in its forwards, and its LoRA gets gradients."""

import pytest
import torch

from linearize.attention.specs import FEATURE_MAPS

SETTINGS = {"batch_size": 1, "steps": 2, "grad_accumulation_steps": 1, "learning_rate": 1e-3, "rank": 2,
            "optimizer": "SGD", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
            "quantized_backward": False, "gradient_checkpointing": True, "checkpoint_depth": 1, "offloading": False,
            "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False}  # fmt: skip
LATENTS = {"flux": (1, 16, 14, 18), "wan": (1, 16, 3, 6, 10)}  # odd grids of tokens: 7 x 9, 3 x 3 x 5


@pytest.fixture
def train(comfy, studio, wan, monkeypatch):
    """A function: train a LoRA with ComfyUI's node; return what of it learned, and {site: kind} that ran."""
    from comfy_extras.nodes_train import TrainLoraNode as cls

    algorithm = next(each for each in cls.define_schema().inputs if each.id == "algorithm").options[0]
    records, finish = [], studio.runtime.Runtime.finish_run

    def finish_run(self):
        records.append(self.record)
        finish(self)

    monkeypatch.setattr(studio.runtime.Runtime, "finish_run", finish_run)

    def run(model, name="flux", **settings):
        used = {"flux": studio, "wan": wan}[name]
        latent = torch.randn(LATENTS[name], generator=torch.Generator().manual_seed(1))
        inputs = {**SETTINGS, "algorithm": algorithm, **settings}
        with torch.inference_mode():
            inputs = {key: [value] for key, value in inputs.items()}
            out = cls.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(
                model=[model], latents=[{"samples": latent}], positive=[used.condition()], **inputs
            )
        lora, losses = out.args[:2]
        assert len(losses["loss"]) == 2 and all(torch.isfinite(torch.tensor(losses["loss"])))
        record = records[-1]
        assert not record.declined and not record.skipped
        learned = {name for name, value in lora.items() if "lora_up" in name and bool(value.abs().max() > 0)}
        return learned, {each.site: each.kind for each in record.ran}

    return run


def student(comfy, model, spec, *, pools=False, outputs=False, deltas=False):
    """Return a student that runs `spec` everywhere with parameters of its own, made as nodes make them."""
    files, plans, students = (
        comfy.module(f"attention.{name}") for name in ("students.file", "plans", "students.learned")
    )
    host, module = comfy.module("patching").host_of(model)
    parameters, changes = {}, {}
    with torch.inference_mode():
        for site in host.sites(module):
            if spec.has_maps:
                pair = students.new_maps(spec, site.num_heads, site.head_dim)
                for part, each in zip(("phi_q", "phi_k"), pair, strict=True):
                    parameters |= {f"{site.id}.{part}.{key}": value for key, value in each.named_parameters()}
            if pools:
                parameters[f"{site.id}.pool"] = torch.rand(spec.down_factor, spec.down_factor)
            if outputs:
                parameters[f"{site.id}.output.weight"] = torch.randn(site.num_heads, site.head_dim, site.head_dim) * 0.1
        if deltas:
            name = "diffusion_model.double_blocks.0.img_attn.qkv"
            changes = {
                f"{name}.lora_up.weight": torch.randn(768, 2) * 0.1,
                f"{name}.lora_down.weight": torch.randn(2, 256),
            }
    file = files.StudentFile(host.name, plans.Plan(host.name, spec), parameters=parameters, deltas=changes)
    specs = dict.fromkeys([site.id for site in host.sites(module)], spec)
    return comfy.module("attention.students.candidates").Candidates.of_student(file, specs)


def attention_layers(model):
    """Return the names of the LoRA's tensors that only the attention of a site passes gradients to."""
    parts = ("img_attn.qkv", "linear1", "self_attn.q", "self_attn.k", "self_attn.v")
    keys = model.model_state_dict()
    return {
        f"{key.removesuffix('.weight')}.lora_up.weight"
        for key in keys
        if key.endswith(tuple(f"{p}.weight" for p in parts))
    }


SPECS = {
    "clear": ("ClearSpec", (3,), {}),
    "clear with pooled keys": ("ClearSpec", (3,), {"down_factor": 2}),
    **{f"linear {name}": ("LinearSpec", (name,), {}) for name in FEATURE_MAPS},
    **{f"hybrid {name}": ("HybridSpec", (2, name), {}) for name in ("hedgehog", "elu1")},
}


@pytest.mark.parametrize("case", SPECS)
def test_untrained_kinds(comfy, studio, train, case):
    """Maps that a node makes are made in inference mode."""
    name, values, more = SPECS[case]
    spec = getattr(comfy.module("attention.specs"), name)(*values, **more)
    plan = comfy.module("attention.plans").Plan("flux", spec)
    with torch.inference_mode():
        patched = comfy.node("LinearizeApply")(model=studio.model, attention=plan)[0]
    learned, ran = train(patched)
    assert set(ran.values()) == {spec.kind} and len(ran) == 4
    assert attention_layers(studio.model) <= learned


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_chunked(comfy, wan, train, feature_map, causal):
    spec = comfy.module("attention.specs").ChunkedSpec(1, 1, causal, feature_map)
    with torch.inference_mode():
        patched = comfy.node("LinearizeApply")(model=wan.model, attention=student(comfy, wan.model, spec))[0]
    learned, ran = train(patched, "wan")
    assert ran == dict.fromkeys(("blocks.0", "blocks.1"), "chunked")
    assert attention_layers(wan.model) <= learned


@pytest.mark.parametrize("settings", [{}, {"bypass_mode": True}], ids=str)
@pytest.mark.parametrize("kind", ["clear", "hybrid"])
def test_students_with_all_they_may_learn(comfy, studio, train, kind, settings):
    """Also after a sampling run, which moved the parameters in inference mode."""
    specs = comfy.module("attention.specs")
    spec = specs.ClearSpec(3, down_factor=2) if kind == "clear" else specs.HybridSpec(2, "polynomial")
    made = student(comfy, studio.model, spec, pools=kind == "clear", outputs=True, deltas=True)
    with torch.inference_mode():
        patched = comfy.node("LinearizeApply")(model=studio.model, attention=made)[0]
        parameters = studio.patching.runtime_of(patched).parameters
        parameters.to(torch.float64).to(torch.float32)
    studio.sample(patched, steps=1)
    learned, ran = train(patched, **settings)
    assert ran == dict.fromkeys(ran, kind) and len(ran) == 4
    assert attention_layers(studio.model) <= learned
    studio.sample(patched, steps=1)
    assert {each for each, _ in studio.ran(patched).values()} == {kind}
