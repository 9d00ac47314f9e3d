"""FLUX.2: text, main grid, references; one token per latent cell."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "image_model": "flux2", "in_channels": 8, "out_channels": 8, "vec_in_dim": None, "context_in_dim": 24,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": True,
    "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip


def build():
    from comfy.ldm.flux.model import Flux

    return Flux(**CONFIG, **default_operations())


def inputs(case):
    references = [noise(case.batch, 8, *size, seed=9 + i) for i, size in enumerate(case.references)]
    return Inputs(
        noise(case.batch, 8, *case.latent),
        noise(case.batch, case.text, 24, seed=1),
        references,
        {"guidance": torch.full((case.batch,), 3.5), **case.options},
    )


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text,
        ref_latents=inputs.references or None, transformer_options=options, **inputs.extra,
    )  # fmt: skip


WITH_REFERENCES = Case(
    latent=(5, 6),
    references=((4, 3), (2, 5)),
    segments=(
        ("text", 5, None),
        ("main", 30, (1, 5, 6)),
        ("reference", 12, None),
        ("reference", 10, None),
    ),
    probes=(
        ("text", (slice(None), 4), {4}),
        ("references.0", (slice(None), slice(None), 2, 1), {35 + 2 * 3 + 1}),
        ("references.1", (slice(None), slice(None), 1, 4), {47 + 1 * 5 + 4}),
    ),
)
CASES = {
    "plain": Case(
        latent=(9, 7),
        segments=(("text", 5, None), ("main", 63, (1, 9, 7))),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(7 * 16, 9 * 16 - 3, 1),
    ),
    "batch 2": Case(latent=(4, 6), text=3, batch=2, segments=(("text", 3, None), ("main", 24, (1, 4, 6)))),
    "references": WITH_REFERENCES,
    "references at time zero": Case(
        latent=WITH_REFERENCES.latent,
        references=WITH_REFERENCES.references,
        segments=WITH_REFERENCES.segments,
        probes=WITH_REFERENCES.probes,
        options={"ref_latents_method": "index_timestep_zero"},
    ),
}

FAMILIES = (
    Family(
        name="flux2",
        host="flux2",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("double.0", "single.0", "single.1"),
        heads=2,
        head_dim=16,
        patch=(1, 1),
        cases=CASES,
    ),
)
