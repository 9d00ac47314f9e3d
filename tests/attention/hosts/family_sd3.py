"""Stable Diffusion 3, and 3.5 medium whose first blocks attend within the picture once more."""

from families import Case, Family, Inputs, default_operations, noise, through_apply_model

CONFIG = {
    "patch_size": 2, "in_channels": 4, "depth": 2, "mlp_ratio": 2.0, "adm_in_channels": 12,
    "pos_embed_max_size": 20, "num_patches": 400, "input_size": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 128}},
}  # fmt: skip


def build(**config):
    def make():
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

        model = OpenAISignatureMMDITWrapper(**CONFIG, **config, **default_operations())
        model.pos_embed.copy_(noise(1, 400, 128, seed=3))  # a buffer, which checkpoints bring
        return model

    return make


def inputs(case):
    extra = {"y": noise(case.batch, 12, seed=2)}
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 16, seed=1), extra=extra)


def forward(model, inputs, options):
    return through_apply_model(model, inputs.latent, inputs.text, options, **inputs.extra)


# name: (latent, text, batch, grid, pixels)
SIZES = {
    "plain": ((18, 24), 5, 1, (1, 9, 12), (192, 144, 1)),
    "odd": ((33, 27), 5, 1, (1, 17, 14), (216, 264, 1)),
    "batch 2": ((16, 10), 3, 2, (1, 8, 5), None),
    "as much text as picture": ((8, 8), 16, 1, (1, 4, 4), None),
}


def cases(*image_sites, registers=0):
    found = {}
    for name, (latent, text, batch, grid, pixels) in SIZES.items():
        main = ("main", grid[1] * grid[2], grid)
        before = (("register", registers, None), ("text", text, None)) if registers else (("text", text, None),)
        found[name] = Case(
            latent=latent, text=text, batch=batch, segments=(*before, main), pixels=pixels,
            own_segments=dict.fromkeys(image_sites, (main,)),
            probes=(("text", (slice(None), 2), {registers + 2}),),
        )  # fmt: skip
    return found


def family(name, make, sites, cases):
    return Family(
        name=name, host="sd3", build=make, inputs=inputs, forward=forward, sites=sites, heads=2, head_dim=64,
        patch=(2, 2), cases=cases,
    )  # fmt: skip


FAMILIES = (
    family("sd3", build(), ("joint.0", "joint.1"), cases()),
    family(
        "sd3.5 medium",
        build(num_blocks=3, qk_norm="rms", x_block_self_attn_layers=[0, 1]),
        ("joint.0", "image.0", "joint.1", "image.1", "joint.2"),
        cases("image.0", "image.1"),
    ),
    family("sd3 with registers", build(register_length=4), ("joint.0", "joint.1"), cases(registers=4)),
)
