"""Mage-Flow: text, main grid, references; one token per latent cell."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "image_model": "mage_flow", "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def build():
    from comfy.ldm.mage_flow.model import MageFlowTransformer2DModel

    return MageFlowTransformer2DModel(**CONFIG, **default_operations())


def inputs(case):
    references = [noise(case.batch, 8, *size, seed=9 + i) for i, size in enumerate(case.references)]
    text = noise(case.batch, case.text, 24, seed=1)
    return Inputs(noise(case.batch, 8, *case.latent), text, references, dict(case.options))


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text,
        ref_latents=inputs.references or None, transformer_options=options, **inputs.extra,
    )  # fmt: skip


CASES = {
    "plain": Case(
        latent=(7, 6),
        segments=(("text", 5, None), ("main", 42, (1, 7, 6))),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(96, 112, 1),
    ),
    "batch 2": Case(latent=(3, 5), text=3, batch=2, segments=(("text", 3, None), ("main", 15, (1, 3, 5)))),
    "references": Case(
        latent=(4, 5),
        references=((3, 2),),
        segments=(("text", 5, None), ("main", 20, (1, 4, 5)), ("reference", 6, None)),
        probes=(("references.0", (slice(None), slice(None), 2, 1), {25 + 5}),),
    ),
    "padded text": Case(
        latent=(4, 3),
        segments=(("text", 5, None), ("main", 12, (1, 4, 3))),
        options={"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])},
        declines=frozenset({"mask"}),
        reason="an attention mask is given",
    ),
}

FAMILIES = (
    Family(
        name="mage_flow",
        host="mage_flow",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("blocks.0", "blocks.1"),
        heads=2,
        head_dim=16,
        patch=(1, 1),
        cases=CASES,
    ),
)
