"""Krea 2: text, main grid, references; grouped keys that the model repeats itself."""

import torch
from families import Case, Family, Inputs, default_operations, each_site, noise

CONFIG = {
    "features": 64, "tdim": 16, "txtdim": 16, "heads": 4, "kvheads": 2, "multiplier": 1, "layers": 2, "patch": 2,
    "channels": 4, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")


def build():
    from comfy.ldm.krea2.model import SingleStreamDiT

    return SingleStreamDiT(**CONFIG, **default_operations())


def inputs(case):
    references = [noise(case.batch, 4, *size, seed=9 + i) for i, size in enumerate(case.references)]
    text = noise(case.batch, case.text, 48, seed=1)
    return Inputs(noise(case.batch, 4, *case.latent), text, references, dict(case.options))


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text,
        ref_latents=inputs.references or None, transformer_options=options, **inputs.extra,
    )  # fmt: skip


def calls(text, tokens):
    """Two blocks fuse the three text features of each token, two refine the text; they belong to no site."""
    return ((None, 3, 3),) * 2 + ((None, text, text),) * 2 + each_site(SITES, tokens)


CASES = {
    "plain": Case(
        latent=(10, 12),
        segments=(("text", 5, None), ("main", 30, (1, 5, 6))),
        calls=calls(5, 35),
        probes=(("text", (slice(None), 2), set(range(5))),),  # the refiner mixes the text
        pixels=(96, 80, 1),
    ),
    "odd": Case(latent=(9, 7), segments=(("text", 5, None), ("main", 20, (1, 5, 4))), calls=calls(5, 25)),
    "batch 2": Case(
        latent=(8, 6), text=4, batch=2, segments=(("text", 4, None), ("main", 12, (1, 4, 3))), calls=calls(4, 16)
    ),
    "references": Case(
        latent=(8, 6),
        references=((6, 6), (5, 8)),
        options={"ref_latents_method": "index_timestep_zero"},
        segments=(
            ("text", 5, None),
            ("main", 12, (1, 4, 3)),
            ("reference", 9, None),
            ("reference", 12, None),
        ),
        calls=calls(5, 38),
        probes=(
            ("references.0", (slice(None), slice(None), slice(2, 4), slice(4, 6)), {17 + 3 + 2}),
            ("references.1", (slice(None), slice(None), slice(2, 4), slice(6, 8)), {26 + 4 + 3}),
        ),
    ),
    "references that nobody placed": Case(
        latent=(8, 6),
        references=((6, 6),),
        segments=(("text", 5, None), ("main", 12, (1, 4, 3))),
        calls=calls(5, 17),
    ),
}

FAMILIES = (
    Family(
        name="krea2",
        host="krea2",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=SITES,
        heads=4,
        head_dim=16,
        patch=(2, 2),
        cases=CASES,
    ),
)
