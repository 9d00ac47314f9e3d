"""Qwen-Image: text, main grid with layers as frames, references."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "image_model": "qwen_image", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def build():
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**CONFIG, **default_operations())


def inputs(case):
    references = [noise(case.batch, 4, *size, seed=9 + i) for i, size in enumerate(case.references)]
    text = noise(case.batch, case.text, 24, seed=1)
    return Inputs(noise(case.batch, 4, *case.latent), text, references, dict(case.options))


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text,
        ref_latents=inputs.references or None, transformer_options=options, **inputs.extra,
    )  # fmt: skip


WITH_REFERENCES = Case(
    latent=(1, 8, 10),
    text=4,
    references=((1, 6, 4), (1, 5, 7)),
    segments=(
        ("text", 4, None),
        ("main", 20, (1, 4, 5)),
        ("reference", 6, None),
        ("reference", 12, None),
    ),
    probes=(
        ("text", (slice(None), 3), {3}),
        ("references.0", (slice(None), slice(None), 0, slice(4, 6), slice(0, 2)), {24 + 4}),
        ("references.1", (slice(None), slice(None), 0, slice(2, 4), slice(4, 6)), {30 + 4 + 2}),
    ),
)
CASES = {
    "plain": Case(
        latent=(1, 14, 12),
        segments=(("text", 5, None), ("main", 42, (1, 7, 6))),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(96, 112, 1),
    ),
    "odd": Case(latent=(1, 9, 7), segments=(("text", 5, None), ("main", 20, (1, 5, 4))), pixels=(56, 72, 1)),
    "layers": Case(latent=(3, 8, 6), segments=(("text", 5, None), ("main", 36, (3, 4, 3))), pixels=(48, 64, 3)),
    "batch 2": Case(latent=(1, 8, 6), text=3, batch=2, segments=(("text", 3, None), ("main", 12, (1, 4, 3)))),
    "references": WITH_REFERENCES,
    "references at time zero": Case(
        latent=WITH_REFERENCES.latent,
        text=4,
        references=WITH_REFERENCES.references,
        segments=WITH_REFERENCES.segments,
        probes=WITH_REFERENCES.probes,
        options={"ref_latents_method": "index_timestep_zero"},
    ),
    "padded text": Case(
        latent=(1, 8, 6),
        segments=(("text", 5, None), ("main", 12, (1, 4, 3))),
        options={"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])},
        declines=frozenset({"mask"}),
        reason="an attention mask is given",
    ),
    "text without padding": Case(
        latent=(1, 8, 6),
        segments=(("text", 5, None), ("main", 12, (1, 4, 3))),
        options={"attention_mask": torch.ones(1, 5, dtype=torch.long)},
    ),
}

FAMILIES = (
    Family(
        name="qwen_image",
        host="qwen_image",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("blocks.0", "blocks.1"),
        heads=2,
        head_dim=16,
        patch=(1, 2, 2),
        cases=CASES,
    ),
)
