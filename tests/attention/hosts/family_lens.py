"""Lens: main grid, then text; every call has a mask."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "enc_hidden_dim": 12, "axes_dims_rope": (4, 6, 6), "selected_layer_index": (0, 1),
}  # fmt: skip


def build():
    from comfy.ldm.lens.model import LensTransformer2DModel

    return LensTransformer2DModel(**CONFIG, **default_operations())


def inputs(case):
    text = noise(case.batch, case.text, 24, seed=1)
    return Inputs(noise(case.batch, 8, *case.latent), text, [], dict(case.options))


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text, transformer_options=options,
        **inputs.extra,
    )  # fmt: skip


CASES = {
    "plain": Case(
        latent=(7, 6),
        segments=(("main", 42, (1, 7, 6)), ("text", 5, None)),
        options={"attention_mask": torch.ones(1, 5, dtype=torch.long)},
        probes=(("text", (slice(None), 2), {44}),),
        pixels=(96, 112, 1),
    ),
    "no mask": Case(latent=(3, 5), segments=(("main", 15, (1, 3, 5)), ("text", 5, None))),
    "empty prompt": Case(latent=(3, 5), text=0, segments=(("main", 15, (1, 3, 5)),)),
    "batch 2": Case(latent=(3, 5), text=3, batch=2, segments=(("main", 15, (1, 3, 5)), ("text", 3, None))),
    "padded text": Case(
        latent=(3, 5),
        segments=(("main", 15, (1, 3, 5)), ("text", 5, None)),
        options={"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])},
        declines=frozenset({"mask"}),
        reason="an attention mask is given",
    ),
}

FAMILIES = (
    Family(
        name="lens",
        host="lens",
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
