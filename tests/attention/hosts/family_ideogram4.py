"""Ideogram 4: text, then a latent of one token per cell."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_channels": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 48,
    "adaln_dim": 16, "llm_features_dim": 24, "mrope_section": (8, 4, 4),
}  # fmt: skip


def build():
    from comfy.ldm.ideogram4.model import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(**CONFIG, **default_operations())


def inputs(case):
    """`padding` is how many tokens at the end of the text hold nothing."""
    extra = {}
    if "padding" in case.options:
        extra["attention_mask"] = torch.ones(case.batch, case.text)
        extra["attention_mask"][:, case.text - case.options["padding"] :] = 0
    return Inputs(noise(case.batch, 16, *case.latent), noise(case.batch, case.text, 24, seed=1), extra=extra)


def forward(model, inputs, options):
    """No text is a call without a context."""
    time, text = torch.full((inputs.latent.shape[0],), 0.5), inputs.text if inputs.text.shape[1] else None
    return model(inputs.latent, time, context=text, control=None, transformer_options=options, **inputs.extra)


def case(latent, text=5, **more):
    main = ("main", latent[0] * latent[1], (1, *latent))
    segments = (("text", text, None), main) if text else (main,)
    return Case(latent=latent, text=text, segments=segments, **more)


CASES = {
    "plain": case((9, 12), pixels=(192, 144, 1), probes=(("text", (slice(None), 2), {2}),)),
    "odd": case((17, 14), pixels=(224, 272, 1)),
    "no prompt": case((4, 5), text=0),
    "long text": case((4, 4), text=700),
    "batch 2": case((8, 5), text=3, batch=2),
    "a mask that hides nothing": case((4, 4), options={"padding": 0}),
    "padding": case((4, 4), options={"padding": 2}, declines=frozenset({"mask"}), reason="attention mask"),
}

FAMILIES = (
    Family(
        name="ideogram4",
        host="ideogram4",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("blocks.0", "blocks.1"),
        heads=2,
        head_dim=32,
        patch=(1, 1),
        cases=CASES,
    ),
)
