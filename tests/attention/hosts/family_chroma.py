"""Chroma: text, main grid. Chroma Radiance: the same on pixels."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "image_model": "chroma", "context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "in_dim": 64, "out_dim": 32,
    "hidden_dim": 16, "n_layers": 1, "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
RADIANCE = {
    "nerf_hidden_size": 8, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 16,
    "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": False,
    "use_sequential_txt_ids": True,
}  # fmt: skip


def build():
    from comfy.ldm.chroma.model import Chroma

    return Chroma(**CONFIG, in_channels=16, out_channels=16, patch_size=2, **default_operations())


def build_radiance():
    from comfy.ldm.chroma_radiance.model import ChromaRadiance

    return ChromaRadiance(**CONFIG, **RADIANCE, in_channels=3, out_channels=3, patch_size=4, **default_operations())


def inputs(channels):
    def make(case):
        return Inputs(noise(case.batch, channels, *case.latent), noise(case.batch, case.text, 24, seed=1))

    return make


def forward(model, inputs, options):
    batch = inputs.latent.shape[0]
    return model(
        inputs.latent, torch.full((batch,), 0.5), inputs.text, torch.zeros(batch),
        transformer_options=options, **inputs.extra,
    )  # fmt: skip


CASES = {
    "plain": Case(
        latent=(10, 14),
        segments=(("text", 5, None), ("main", 35, (1, 5, 7))),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(112, 80, 1),
    ),
    "odd": Case(latent=(9, 5), segments=(("text", 5, None), ("main", 15, (1, 5, 3))), pixels=(40, 72, 1)),
    "batch 2": Case(latent=(8, 6), text=3, batch=2, segments=(("text", 3, None), ("main", 12, (1, 4, 3)))),
}
PIXELS = {
    "plain": Case(
        latent=(20, 28),
        segments=(("text", 5, None), ("main", 35, (1, 5, 7))),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(28, 20, 1),
    ),
    "odd": Case(latent=(17, 10), segments=(("text", 5, None), ("main", 15, (1, 5, 3))), pixels=(10, 17, 1)),
    "batch 2": Case(latent=(16, 12), text=3, batch=2, segments=(("text", 3, None), ("main", 12, (1, 4, 3)))),
}

FAMILIES = tuple(
    Family(
        name=name,
        host="chroma",
        build=make,
        inputs=inputs(channels),
        forward=forward,
        sites=("double.0", "double.1", "single.0"),
        heads=2,
        head_dim=16,
        patch=patch,
        cases=cases,
    )
    for name, make, channels, patch, cases in (
        ("chroma", build, 4, (2, 2), CASES),
        ("chroma_radiance", build_radiance, 3, (4, 4), PIXELS),
    )
)
