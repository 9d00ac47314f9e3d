"""JoyImage: main grid, references, text."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "mlp_width_ratio": 1.0,
    "num_layers": 2, "rope_dim_list": [4, 6, 6],
}  # fmt: skip


def build():
    from comfy.ldm.joyimage.model import JoyImageTransformer3DModel

    return JoyImageTransformer3DModel(**CONFIG, **default_operations())


def inputs(case):
    references = [noise(case.batch, 4, *size, seed=9 + i) for i, size in enumerate(case.references)]
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 24, seed=1), references)


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text,
        ref_latents=inputs.references or None, transformer_options=options,
    )  # fmt: skip


CASES = {
    "plain": Case(
        latent=(1, 10, 12),
        segments=(("main", 30, (1, 5, 6)), ("text", 5, None)),
        probes=(("text", (slice(None), 2), {32}),),
        pixels=(96, 80, 1),
    ),
    "odd": Case(latent=(1, 9, 7), segments=(("main", 20, (1, 5, 4)), ("text", 5, None))),
    "frames": Case(latent=(3, 6, 8), segments=(("main", 36, (3, 3, 4)), ("text", 5, None)), pixels=(64, 48, 9)),
    "batch 2": Case(latent=(1, 8, 6), text=3, batch=2, segments=(("main", 12, (1, 4, 3)), ("text", 3, None))),
    "references": Case(
        latent=(1, 8, 6),
        references=((1, 6, 6), (1, 5, 8)),
        segments=(
            ("main", 12, (1, 4, 3)),
            ("reference", 9, None),
            ("reference", 12, None),
            ("text", 5, None),
        ),
        probes=(
            ("references.0", (slice(None), slice(None), 0, slice(2, 4), slice(4, 6)), {12 + 3 + 2}),
            ("references.1", (slice(None), slice(None), 0, slice(2, 4), slice(6, 8)), {21 + 4 + 3}),
            ("text", (slice(None), 4), {37}),
        ),
    ),
}

FAMILIES = (
    Family(
        name="joyimage",
        host="joyimage",
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
