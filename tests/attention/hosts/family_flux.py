"""FLUX.1, and Ovis-Image, which ComfyUI runs in the same class: text, main grid, references."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
    "hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
    "txt_ids_dims": [],
}  # fmt: skip
OVIS = {
    **CONFIG, "vec_in_dim": None, "hidden_size": 32, "axes_dim": [4, 6, 6], "txt_ids_dims": [1, 2], "yak_mlp": True,
    "txt_norm": True,
}  # fmt: skip


def builder(config):
    def build():
        from comfy.ldm.flux.model import Flux

        return Flux(**config, **default_operations())

    return build


def inputs(case):
    references = [noise(case.batch, 16, *size, seed=9 + i) for i, size in enumerate(case.references)]
    return Inputs(noise(case.batch, 16, *case.latent), noise(case.batch, case.text, 64, seed=1), references)


def forward(model, inputs, options):
    batch = inputs.latent.shape[0]
    return model(
        inputs.latent, torch.full((batch,), 0.5), inputs.text, torch.zeros(batch, 32), None, inputs.references or None,
        transformer_options=options, **inputs.extra,
    )  # fmt: skip


CASES = {
    "plain": Case(
        latent=(18, 24),
        segments=(("text", 5, None), ("main", 108, (1, 9, 12))),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(192, 144, 1),
    ),
    "odd": Case(latent=(33, 27), segments=(("text", 5, None), ("main", 238, (1, 17, 14))), pixels=(216, 264, 1)),
    "one text token": Case(latent=(8, 8), text=1, segments=(("text", 1, None), ("main", 16, (1, 4, 4)))),
    "long text": Case(latent=(8, 8), text=700, segments=(("text", 700, None), ("main", 16, (1, 4, 4)))),
    "batch 2": Case(latent=(16, 10), text=3, batch=2, segments=(("text", 3, None), ("main", 40, (1, 8, 5)))),
    "references": Case(
        latent=(16, 16),
        text=4,
        references=((10, 13), (6, 8)),
        segments=(
            ("text", 4, None),
            ("main", 64, (1, 8, 8)),
            ("reference", 35, None),
            ("reference", 12, None),
        ),
        probes=(
            ("text", (slice(None), 2), {2}),
            ("references.0", (slice(None), slice(None), slice(2, 4), slice(2, 4)), {68 + 7 + 1}),
            ("references.1", (slice(None), slice(None), slice(2, 4), slice(4, 6)), {103 + 4 + 2}),
        ),
    ),
}

FAMILIES = tuple(
    Family(
        name=name,
        host="flux",
        build=builder(config),
        inputs=inputs,
        forward=forward,
        sites=("double.0", "double.1", "single.0", "single.1"),
        heads=2,
        head_dim=head_dim,
        patch=(2, 2),
        cases={case: CASES[case] for case in cases},
    )
    for name, config, head_dim, cases in (
        ("flux", CONFIG, 128, CASES),
        ("ovis", OVIS, 16, ("plain", "odd", "batch 2", "references")),
    )
)
