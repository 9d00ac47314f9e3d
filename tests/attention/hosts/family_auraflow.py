"""AuraFlow: registers, text, main grid."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 64, "n_layers": 4, "n_double_layers": 2, "n_heads": 2,
    "global_conddim": 64, "cond_seq_dim": 16, "max_seq": 400,
}  # fmt: skip


def build():
    from comfy.ldm.aura.mmdit import MMDiT

    return MMDiT(**CONFIG, **default_operations())


def inputs(case):
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 16, seed=1))


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 0.5)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options)


def case(latent, grid, text=5, **more):
    segments = (("register", 8, None), ("text", text, None), ("main", grid[1] * grid[2], grid))
    probes = (("text", (slice(None), 2), {10}), ("parameter:register_tokens", (0, 3), {3}))
    return Case(latent=latent, text=text, segments=segments, probes=probes, **more)


CASES = {
    "plain": case((18, 24), (1, 9, 12), pixels=(192, 144, 1)),
    "odd": case((33, 27), (1, 17, 14), pixels=(216, 264, 1)),
    "long text": case((8, 8), (1, 4, 4), text=700),
    "batch 2": case((16, 10), (1, 8, 5), text=3, batch=2),
}

FAMILIES = (
    Family(
        name="auraflow",
        host="auraflow",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("double.0", "double.1", "single.0", "single.1"),
        heads=2,
        head_dim=32,
        patch=(2, 2),
        cases=CASES,
    ),
)
