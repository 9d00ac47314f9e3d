"""Lumina-Image 2.0 (text, main grid) and Z-Image (each filled up with pads; references)."""

import torch
from families import Case, Family, Inputs, default_operations, each_site, noise

CONFIG = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 4, "dim": 32, "cap_feat_dim": 24, "n_layers": 2,
    "qk_norm": True, "n_heads": 2, "axes_dims": [4, 6, 6], "axes_lens": [300, 512, 512], "multiple_of": 8,
    "ffn_dim_multiplier": 1.0,
}  # fmt: skip
LUMINA = {**CONFIG, "n_kv_heads": 1}
Z_IMAGE = {
    **CONFIG, "dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 8,
}  # fmt: skip  # its modulation is at least 256 wide
OMNI = {**Z_IMAGE, "siglip_feat_dim": 12}
PIXELS = {
    **Z_IMAGE, "in_channels": 3, "patch_size": 4, "decoder_hidden_size": 8, "decoder_num_res_blocks": 1,
    "decoder_max_freqs": 2, "decoder_in_channels": 48,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")


def builder(config, refiners):
    def build():
        from comfy.ldm.lumina.model import NextDiT, NextDiTPixelSpace

        model = NextDiTPixelSpace if "decoder_hidden_size" in config else NextDiT
        return model(**config, n_refiner_layers=refiners, **default_operations())

    return build


def inputs(channels):
    def make(case):
        references = [noise(case.batch, channels, *size, seed=9 + i) for i, size in enumerate(case.references)]
        texts = [noise(case.batch, n, 24, seed=20 + n) for n in case.options.get("texts", ())]
        vision = [noise(case.batch, *size, 12, seed=30) for size in case.options.get("vision", ())]
        text = noise(case.batch, case.text, 24, seed=1)
        extra = {"ref_contexts": texts, "siglip_feats": vision}
        return Inputs(noise(case.batch, channels, *case.latent), text, references, extra)

    return make


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text, inputs.text.shape[1],
        transformer_options=options, ref_latents=inputs.references, **inputs.extra,
    )  # fmt: skip


def calls(text, picture, siglip=0):
    """One refiner layer of the text, of vision features and of the picture each; they belong to no site."""
    refiners = tuple((None, n, n) for n in (text, siglip, picture) if n)
    return (*refiners, *each_site(SITES, text + siglip + picture))


LUMINA_CASES = {
    "plain": Case(
        latent=(10, 12),
        segments=(("text", 5, None), ("main", 30, (1, 5, 6))),
        calls=calls(5, 30),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(96, 80, 1),
    ),
    "odd": Case(latent=(9, 7), segments=(("text", 5, None), ("main", 20, (1, 5, 4))), calls=calls(5, 20)),
    "batch 2": Case(
        latent=(8, 6), text=3, batch=2, segments=(("text", 3, None), ("main", 12, (1, 4, 3))), calls=calls(3, 12)
    ),
}
Z_CASES = {
    "plain": Case(
        latent=(10, 12),
        segments=(("text", 5, None), ("pad", 3, None), ("main", 30, (1, 5, 6)), ("pad", 2, None)),
        calls=calls(8, 32),
        probes=(
            ("text", (slice(None), 2), {2}),
            ("parameter:cap_pad_token", (), {5, 6, 7}),
            ("parameter:x_pad_token", (), {38, 39}),
        ),
        pixels=(96, 80, 1),
    ),
    "odd": Case(
        latent=(9, 7),
        text=8,
        segments=(("text", 8, None), ("main", 20, (1, 5, 4)), ("pad", 4, None)),
        calls=calls(8, 24),
    ),
    "no pads": Case(
        latent=(8, 8), text=16, segments=(("text", 16, None), ("main", 16, (1, 4, 4))), calls=calls(16, 16)
    ),
    "batch 2": Case(
        latent=(8, 6),
        text=3,
        batch=2,
        segments=(("text", 3, None), ("pad", 5, None), ("main", 12, (1, 4, 3)), ("pad", 4, None)),
        calls=calls(8, 16),
    ),
    "references": Case(
        latent=(8, 6),
        text=4,
        references=((6, 6), (4, 8)),
        options={"texts": (3,)},
        segments=(
            ("text", 3, None), ("pad", 5, None), ("pad", 8, None), ("text", 4, None), ("pad", 4, None),
            ("reference", 9, None), ("pad", 7, None), ("reference", 8, None), ("main", 12, (1, 4, 3)),
            ("pad", 4, None),
        ),
        calls=calls(24, 40),
        probes=(
            ("text", (slice(None), 1), {17}),
            ("ref_contexts.0", (slice(None), 2), {2}),
            ("references.0", (slice(None), slice(None), slice(2, 4), slice(4, 6)), {24 + 3 + 2}),
            ("references.1", (slice(None), slice(None), slice(2, 4), slice(6, 8)), {40 + 4 + 3}),
            ("parameter:x_pad_token", (), {*range(33, 40), *range(60, 64)}),
        ),
    ),
}  # fmt: skip
OMNI_CASES = {
    "plain": Case(
        latent=(8, 6),
        segments=(("text", 5, None), ("pad", 3, None), ("main", 12, (1, 4, 3)), ("pad", 4, None)),
        calls=calls(8, 16),
        pixels=(48, 64, 1),
    ),
    "batch 2": Case(
        latent=(8, 6),
        batch=2,
        segments=(("text", 5, None), ("pad", 3, None), ("main", 12, (1, 4, 3)), ("pad", 4, None)),
        calls=calls(8, 16),
    ),
    "references": Case(
        latent=(8, 6),
        references=((4, 6), (4, 4)),
        options={"texts": (2, 6, 10), "vision": ((2, 3),)},
        segments=(
            ("text", 2, None), ("pad", 6, None), ("text", 6, None), ("pad", 2, None), ("text", 5, None),
            ("pad", 3, None), ("text", 10, None), ("pad", 6, None), ("reference", 6, None), ("pad", 2, None),
            ("pad", 8, None), ("pad", 8, None), ("reference", 6, None), ("pad", 2, None), ("reference", 4, None),
            ("pad", 4, None), ("main", 12, (1, 4, 3)), ("pad", 4, None),
        ),
        calls=calls(40, 32, 24),
        probes=(
            ("text", (slice(None), 1), {16 + 1}),
            ("ref_contexts.1", (slice(None), 5), {8 + 5}),
            ("ref_contexts.2", (slice(None), 0), {24}),
            ("siglip_feats.0", (slice(None), 1, 2), set(range(40, 46))),  # ComfyUI shuffles their channels
            ("parameter:siglip_pad_token", (), {46, 47, *range(48, 64)}),
            ("references.1", (slice(None), slice(None), slice(2, 4), slice(0, 2)), {72 + 2}),
        ),
    ),
}  # fmt: skip
PIXEL_CASES = {
    "plain": Case(
        latent=(20, 24),
        segments=(("text", 5, None), ("pad", 3, None), ("main", 30, (1, 5, 6)), ("pad", 2, None)),
        calls=calls(8, 32),
        pixels=(24, 20, 1),
    ),
    "batch 2": Case(
        latent=(16, 12),
        batch=2,
        segments=(("text", 5, None), ("pad", 3, None), ("main", 12, (1, 4, 3)), ("pad", 4, None)),
        calls=calls(8, 16),
    ),
}

FAMILIES = tuple(
    Family(
        name=name,
        host="lumina2",
        build=builder(config, 1),
        oracle=builder(config, 0),
        inputs=inputs(config["in_channels"]),
        forward=forward,
        sites=SITES,
        heads=config["n_heads"],
        head_dim=config["dim"] // config["n_heads"],
        patch=(config["patch_size"],) * 2,
        cases=cases,
    )
    for name, config, cases in (
        ("lumina2", LUMINA, LUMINA_CASES),
        ("z_image", Z_IMAGE, Z_CASES),
        ("z_image_omni", OMNI, OMNI_CASES),
        ("z_image_pixel", PIXELS, PIXEL_CASES),
    )
)
