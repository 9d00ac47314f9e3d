"""HunyuanVideo 1.0 and 1.5, HunyuanImage 2.1: vision, glyphs, text, reference frames, main grid.

ComfyUI's forward of 1.0 fails on a latent that its patch does not divide, so there is no odd case.
"""

import torch
from families import Case, Family, Inputs, default_operations, each_site, noise

CONFIG = {
    "image_model": "hunyuan_video", "context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "out_channels": 4, "in_channels": 4,
    "meanflow_sum": False,
}  # fmt: skip
VIDEO = {
    **CONFIG, "patch_size": [1, 2, 2], "axes_dim": [4, 6, 6], "vec_in_dim": 12, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
}  # fmt: skip
VIDEO15 = {
    **CONFIG, "patch_size": [1, 1, 1], "axes_dim": [4, 6, 6], "vec_in_dim": None, "guidance_embed": False,
    "byt5": True, "meanflow": False, "use_cond_type_embedding": True, "vision_in_dim": 20,
}  # fmt: skip
IMAGE = {
    **CONFIG, "patch_size": [1, 1], "axes_dim": [8, 8], "vec_in_dim": None, "guidance_embed": True,
    "byt5": True, "meanflow": True, "use_cond_type_embedding": False, "vision_in_dim": None,
}  # fmt: skip
SITES = ("double.0", "single.0")


def builder(config):
    def build():
        from comfy.ldm.hunyuan_video.model import HunyuanVideo

        return HunyuanVideo(**config, **default_operations())

    return build


def inputs(case):
    sizes = case.options.get("tokens", {})
    widths = {"txt_byt5": 1472, "clip_fea": 20}
    extra = {name: noise(case.batch, count, widths[name], seed=4) for name, count in sizes.items()}
    if "ref_latent" in case.options:
        extra["ref_latent"] = noise(case.batch, 4, *case.options["ref_latent"], seed=5)
    extra |= {name: case.options[name] for name in ("attention_mask", "y") if name in case.options}
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 24, seed=1), [], extra)


def forward(model, inputs, options):
    batch, levels = inputs.latent.shape[0], torch.tensor([1.0, 0.5, 0.0])
    if model.vector_in is not None:
        inputs.extra["y"] = torch.zeros(batch, 12)
    return model(
        inputs.latent, torch.full((batch,), 0.5), inputs.text, guidance=torch.full((batch,), 6.0),
        transformer_options={**options, "sigmas": levels[1:2], "sample_sigmas": levels}, **inputs.extra,
    )  # fmt: skip


def calls(text, tokens):
    """The two blocks of the token refiner come first, and belong to no site."""
    return ((None, text, text), (None, text, text), *each_site(SITES, tokens))


CASES = {
    "plain": Case(
        latent=(3, 10, 8),
        segments=(("text", 5, None), ("main", 60, (3, 5, 4))),
        calls=calls(5, 65),
        probes=(("text", (slice(None), 2), set(range(5))),),  # the refiner mixes the text
        pixels=(64, 80, 9),
    ),
    "picture": Case(latent=(1, 6, 8), segments=(("text", 5, None), ("main", 12, (1, 3, 4))), calls=calls(5, 17)),
    "batch 2": Case(
        latent=(2, 6, 8), text=3, batch=2, segments=(("text", 3, None), ("main", 24, (2, 3, 4))), calls=calls(3, 27)
    ),
    "reference frame": Case(
        latent=(2, 6, 8),
        segments=(("text", 5, None), ("reference", 12, None), ("main", 24, (2, 3, 4))),
        calls=calls(5, 41),
        options={"ref_latent": (1, 6, 8)},
        probes=(("ref_latent", (slice(None), slice(None), 0, slice(2, 4), slice(6, 8)), {5 + 4 + 3}),),
    ),
    "padded text": Case(
        latent=(1, 6, 8),
        segments=(("text", 5, None), ("main", 12, (1, 3, 4))),
        calls=calls(5, 17),
        options={"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])},
        declines=frozenset({"mask"}),
        reason="an attention mask is given",
    ),
}
CASES15 = {
    "plain": Case(
        latent=(3, 5, 4),
        segments=(("text", 5, None), ("main", 60, (3, 5, 4))),
        calls=calls(5, 65),
        probes=(("text", (slice(None), 2), set(range(5))),),
        pixels=(64, 77, 12),
    ),
    "batch 2": Case(
        latent=(2, 3, 4), text=3, batch=2, segments=(("text", 3, None), ("main", 24, (2, 3, 4))), calls=calls(3, 27)
    ),
    "picture and glyphs": Case(
        latent=(2, 3, 5),
        options={"tokens": {"clip_fea": 4, "txt_byt5": 3}},
        segments=(("reference", 4, None), ("text", 3, None), ("text", 5, None), ("main", 30, (2, 3, 5))),
        calls=calls(5, 42),
        probes=(
            ("clip_fea", (slice(None), 1), {1}),
            ("txt_byt5", (slice(None), 2), {4 + 2}),
            ("text", (slice(None), 0), set(range(7, 12))),
        ),
    ),
}
IMAGES = {
    "plain": Case(
        latent=(7, 6),
        segments=(("text", 5, None), ("main", 42, (1, 7, 6))),
        calls=calls(5, 47),
        probes=(("text", (slice(None), 2), set(range(5))),),
        pixels=(192, 224, 1),
    ),
    "batch 2": Case(
        latent=(3, 5), text=3, batch=2, segments=(("text", 3, None), ("main", 15, (1, 3, 5))), calls=calls(3, 18)
    ),
    "glyphs": Case(
        latent=(4, 5),
        options={"tokens": {"txt_byt5": 3}},
        segments=(("text", 5, None), ("text", 3, None), ("main", 20, (1, 4, 5))),
        calls=calls(5, 28),
        probes=(("txt_byt5", (slice(None), 0), {5}),),
    ),
}

FAMILIES = tuple(
    Family(
        name=name,
        host="hunyuan_video",
        build=builder(config),
        inputs=inputs,
        forward=forward,
        sites=SITES,
        heads=2,
        head_dim=16,
        patch=patch,
        cases=cases,
    )
    for name, config, patch, cases in (
        ("hunyuan_video", VIDEO, (1, 2, 2), CASES),
        ("hunyuan_video_15", VIDEO15, (1, 1, 1), CASES15),
        ("hunyuan_image", IMAGE, (1, 1), IMAGES),
    )
)
