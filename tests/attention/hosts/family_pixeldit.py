"""PixelDiT: text and patches of pixels, then the patches by themselves."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_channels": 3, "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 4, "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1, "patch_size": 4, "txt_embed_dim": 16,
    "txt_max_length": 20,
}  # fmt: skip
SITES = ("joint.0", "joint.1", "pixel.0")


def build():
    from comfy.ldm.pixeldit.model import PixDiT_T2I

    return PixDiT_T2I(**CONFIG, **default_operations())


def build_pid():
    from comfy.ldm.pixeldit.pid import PidNet

    sizes = {"lq_latent_channels": 4, "lq_hidden_dim": 8, "lq_num_res_blocks": 1, "sr_scale": 1}
    return PidNet(**CONFIG, **sizes, latent_spatial_down_factor=4, **default_operations())


def inputs(case):
    """`given` is the length of a text that the model cuts, `decoded` the size of a latent to decode."""
    text, extra = noise(case.batch, case.options.get("given", case.text), 16, seed=1), {}
    if "decoded" in case.options:
        extra = {
            "lq_latent": noise(case.batch, 4, *case.options["decoded"], seed=2),
            "degrade_sigma": torch.full((case.batch,), 0.1),
        }
    return Inputs(noise(case.batch, 3, *case.latent), text, extra=extra)


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 500.0)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options, **inputs.extra)


def case(latent, grid, text=5, **more):
    main = ("main", grid[1] * grid[2], grid)
    probes = (("text", (slice(None), 2), {2}),)
    return Case(
        latent=latent, text=text, segments=(("text", text, None), main), own_segments={"pixel.0": (main,)},
        probes=probes, **more,
    )  # fmt: skip


CASES = {
    "plain": case((24, 36), (1, 6, 9), pixels=(36, 24, 1)),
    "odd": case((33, 27), (1, 9, 7), pixels=(27, 33, 1)),
    "cut text": case((16, 16), (1, 4, 4), text=20, options={"given": 31}),
    "as much text as picture": case((16, 16), (1, 4, 4), text=16),
    "batch 2": case((16, 20), (1, 4, 5), text=3, batch=2),
}

PID = {
    "plain": case((24, 36), (1, 6, 9), options={"decoded": (6, 9)}, pixels=(36, 24, 1)),
    "batch 2": case((16, 20), (1, 4, 5), text=3, batch=2, options={"decoded": (4, 5)}),
}


def family(name, make, cases):
    return Family(
        name=name, host="pixeldit", build=make, inputs=inputs, forward=forward, sites=SITES, heads=2, head_dim=32,
        patch=(4, 4), cases=cases,
    )  # fmt: skip


FAMILIES = (family("pixeldit", build, CASES), family("pid", build_pid, PID))
