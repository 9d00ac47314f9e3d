"""Mochi 1: frames, then the text without its padding."""

import torch
from families import Case, Family, Inputs, default_operations, noise, through_apply_model

CONFIG = {
    "patch_size": 2, "in_channels": 4, "hidden_size_x": 64, "hidden_size_y": 32, "depth": 2, "num_heads": 2,
    "mlp_ratio_x": 192.0, "mlp_ratio_y": 2.0, "use_t5": True, "t5_feat_dim": 16, "learn_sigma": False,
    "qk_norm": True, "qkv_bias": False, "out_bias": True,
}  # fmt: skip


def build():
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    return AsymmDiTJoint(**CONFIG, **default_operations())


def build_without_pooled_text():
    """The text as a whole modulates every token; for the oracle it must not."""

    class Nothing(torch.nn.Module):
        def forward(self, text, mask):
            return text.new_zeros(text.shape[0], 64)

    model = build()
    model.t5_y_embedder = Nothing()
    return model


def inputs(case):
    """`padding` tokens follow those of the text."""
    length = case.text + case.options.get("padding", 0)
    mask = torch.ones(case.batch, length)
    mask[:, case.text :] = 0
    extra = {"attention_mask": mask}
    if "padding" in case.options:
        extra["num_tokens"] = case.text
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, length, 16, seed=1), extra=extra)


def forward(model, inputs, options):
    return through_apply_model(model, inputs.latent, inputs.text, options, **inputs.extra)


def case(latent, grid, text=5, **more):
    main = ("main", grid[0] * grid[1] * grid[2], grid)
    probes = (("text", (slice(None), 2), {main[1] + 2}),)
    return Case(latent=latent, text=text, segments=(main, ("text", text, None)), probes=probes, **more)


CASES = {
    "plain": case((3, 8, 10), (3, 4, 5), pixels=(80, 64, 13)),
    "odd": case((2, 10, 6), (2, 5, 3), pixels=(48, 80, 7)),
    "one frame": case((1, 8, 8), (1, 4, 4), pixels=(64, 64, 1)),
    "padded text": case((1, 8, 8), (1, 4, 4), options={"padding": 7}),
    "as much text as video": case((1, 8, 8), (1, 4, 4), text=16),
    "batch 2": case((3, 8, 10), (3, 4, 5), text=3, batch=2),
}

FAMILIES = (
    Family(
        name="mochi",
        host="mochi",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("blocks.0", "blocks.1"),
        heads=2,
        head_dim=32,
        patch=(1, 2, 2),
        cases=CASES,
        oracle=build_without_pooled_text,
    ),
)
