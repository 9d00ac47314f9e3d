"""Kandinsky 5: the main grid alone; text in its own blocks and in cross-attention.

ComfyUI gives back a larger latent for one that its patch does not divide, so there is no odd case.
"""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 12, "time_dim": 16, "model_dim": 32,
    "ff_dim": 32, "visual_embed_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
}  # fmt: skip


def build():
    from comfy.ldm.kandinsky5.model import Kandinsky5

    return Kandinsky5(**CONFIG, **default_operations())


def inputs(case):
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 24, seed=1))


def forward(model, inputs, options):
    batch = inputs.latent.shape[0]
    return model(
        inputs.latent, torch.full((batch,), 0.5), inputs.text, torch.zeros(batch, 12), transformer_options=options
    )


def calls(text, tokens):
    """The text block first; cross-attention behind each site."""
    blocks = [((site, tokens, tokens), (None, tokens, text)) for site in ("blocks.0", "blocks.1")]
    return ((None, text, text), *(call for block in blocks for call in block))


CASES = {
    "plain": Case(latent=(3, 10, 8), segments=(("main", 60, (3, 5, 4)),), calls=calls(5, 60), pixels=(64, 80, 9)),
    "as many text tokens": Case(latent=(1, 6, 8), text=12, segments=(("main", 12, (1, 3, 4)),), calls=calls(12, 12)),
    "batch 2": Case(latent=(2, 6, 8), text=3, batch=2, segments=(("main", 24, (2, 3, 4)),), calls=calls(3, 24)),
}
PICTURES = {
    "plain": Case(latent=(10, 8), segments=(("main", 20, (1, 5, 4)),), calls=calls(5, 20), pixels=(64, 80, 1)),
    "batch 2": Case(latent=(6, 8), text=3, batch=2, segments=(("main", 12, (1, 3, 4)),), calls=calls(3, 12)),
}  # fmt: skip

FAMILIES = tuple(
    Family(
        name=name,
        host="kandinsky5",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("blocks.0", "blocks.1"),
        heads=2,
        head_dim=16,
        patch=patch,
        cases=cases,
    )
    for name, patch, cases in (("kandinsky5", (1, 2, 2), CASES), ("kandinsky5_image", (2, 2), PICTURES))
)
