"""Wan 2.1 and 2.2 and their variants: frames, and around them the references that each variant adds."""

import dataclasses

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "patch_size": (1, 2, 2), "in_dim": 4, "out_dim": 4, "dim": 64, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16,
    "num_heads": 2, "num_layers": 2,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")
GRID = ("main", 60, (3, 4, 5))  # of a latent of 3 x 8 x 10
CELL = (slice(None), slice(None), slice(0, 1), slice(2, 4), slice(4, 6))  # one patch: row 1, column 2


def build(name, module="model", **config):
    def make():
        import importlib

        cls = getattr(importlib.import_module(f"comfy.ldm.wan.{module}"), name)
        return cls(**{**CONFIG, **config}, **default_operations())

    return make


def inputs(case):
    """Take `extra` of the case as shapes by the name of the argument, a list of shapes for a list."""
    extra = {}
    for number, (name, shape) in enumerate(case.options.items()):
        if isinstance(shape, list):
            extra[name] = [noise(case.batch, *each, seed=50 + number) for each in shape]
        else:
            extra[name] = noise(case.batch, *shape, seed=9 + number)
    if "vace_context" in extra:
        extra["vace_strength"] = [1.0, 0.5][: extra["vace_context"].shape[1]]
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 16, seed=1), [], extra)


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 0.5)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options, **inputs.extra)


def calls(tokens, *cross, sites=SITES):
    """Each site, and after it the cross-attentions of its block, as (queries, keys)."""
    found = []
    for site in sites:
        found.append((site, tokens, tokens))
        found += [(None, *each) for each in cross]
    return tuple(found)


def family(name, make, cases, sites=SITES):
    return Family(
        name=name, host="wan", build=make, inputs=inputs, forward=forward, sites=sites, heads=2, head_dim=32,
        patch=(1, 2, 2), cases=cases,
    )  # fmt: skip


def with_batch(plain, **changes):
    """Return a case and the same one in a batch of two."""
    both = {"plain": plain | changes, "batch 2": {**plain, **changes, "batch": 2}}
    return {name: Case(**arguments) for name, arguments in both.items()}


VIDEO = {"latent": (3, 8, 10), "segments": (GRID,), "pixels": (80, 64, 9)}

T2V = with_batch(VIDEO, calls=calls(60, (60, 5))) | {
    "odd": Case(
        latent=(2, 9, 7), segments=(("main", 40, (2, 5, 4)),), calls=calls(40, (40, 5)), pixels=(56, 72, 5)
    ),
    "one frame": Case(
        latent=(1, 8, 8), segments=(("main", 16, (1, 4, 4)),), calls=calls(16, (16, 5)), pixels=(64, 64, 1)
    ),
    "as much text as video": Case(latent=(3, 8, 10), text=60, segments=(GRID,), calls=calls(60, (60, 60))),
    "subjects joined in time": Case(
        latent=(3, 8, 10),
        options={"time_dim_concat": (4, 2, 8, 10)},
        segments=(GRID, ("reference", 40, None)),
        calls=calls(100, (100, 5)),
        probes=(("time_dim_concat", CELL, {60 + 1 * 5 + 2}),),
    ),
    "in-context latents": Case(
        latent=(3, 8, 10),
        options={"time_dim_concat": (4, 1, 8, 10), "context_latents": [(4, 1, 6, 7), (4, 3, 8, 10)]},
        segments=(GRID, ("reference", 20, None), ("reference", 12, None), ("reference", 60, None)),
        calls=calls(152, (152, 5)),
        probes=(
            ("time_dim_concat", CELL, {60 + 1 * 5 + 2}),
            ("context_latents.0", CELL, {80 + 1 * 4 + 2}),
            ("context_latents.1", CELL, {92 + 1 * 5 + 2}),
        ),
    ),
}  # fmt: skip

# the image is in the channels of the latent, and in 257 tokens of CLIP
I2V = with_batch(VIDEO, options={"clip_fea": (257, 1280)}, calls=calls(60, (60, 257), (60, 5)))

FUN = with_batch(
    VIDEO,
    options={"reference_latent": (4, 8, 10), "clip_fea": (257, 1280)},
    segments=(("reference", 20, None), GRID),
    calls=calls(80, (80, 257), (80, 5)),
    probes=(("reference_latent", (slice(None), slice(None), slice(2, 4), slice(4, 6)), {1 * 5 + 2}),),
    pixels=None,
) | {"no reference": Case(**VIDEO, calls=calls(60, (60, 5), (60, 5)))}

VACE_SITES = ("blocks.0", "vace.0", "blocks.1", "blocks.2", "vace.1", "blocks.3")
VACE = with_batch(VIDEO, options={"vace_context": (1, 6, 3, 8, 10)}, calls=calls(60, (60, 5), sites=VACE_SITES))

REFERENCE_AFTER = {
    "options": {"reference_latent": (4, 1, 8, 10)},
    "segments": (GRID, ("reference", 20, None)),
    "probes": (("reference_latent", CELL, {60 + 1 * 5 + 2}),),
    "pixels": None,
}

S2V = with_batch(VIDEO, **REFERENCE_AFTER, calls=calls(80, (80, 5))) | {
    "neither": Case(**VIDEO, calls=calls(60, (60, 5))),
    "motion": Case(
        latent=(3, 16, 16),
        options={"reference_latent": (4, 1, 16, 16), "reference_motion": (16, 19, 16, 16)},
        # 64 tokens of the last motion frame, 16 of the two before, 4 x 2 x 2 of the 16 before these
        segments=(("main", 192, (3, 8, 8)), ("reference", 64, None), ("reference", 96, None)),
        calls=calls(352, (352, 5)),
        probes=(
            ("reference_motion", (slice(None), slice(None), 18, slice(2, 4), slice(4, 6)), {256 + 1 * 8 + 2}),
            ("reference_motion", (slice(None), slice(None), 16, slice(4, 6), slice(8, 10)), {320 + 1 * 4 + 2}),
            ("reference_motion", (slice(None), slice(None), 5, slice(8, 9), slice(0, 3)), {336 + 1 * 4 + 2}),
        ),
    ),
}


def humo_calls(tokens, frames):
    """The sound is seen frame by frame, 16 tokens each, in a batch of frames."""
    return calls(tokens, (tokens, 5), (tokens // frames, 16))


HUMO = with_batch(VIDEO, **REFERENCE_AFTER, calls=calls(80, (80, 5))) | {
    "sound": Case(
        latent=(3, 8, 8),  # 16 tokens a frame, as many as the sound has
        options={"audio_embed": (3, 1, 1, 4)},
        segments=(("main", 48, (3, 4, 4)),),
        calls=humo_calls(48, 3),
        pixels=(64, 64, 9),
    ),
}

SCAIL = with_batch(
    VIDEO,
    options={"reference_latent": (4, 2, 8, 10), "pose_latents": (4, 3, 4, 5), "clip_fea": (257, 1280)},
    segments=(("reference", 40, None), GRID, ("reference", 18, None)),
    calls=calls(118, (118, 257), (118, 5)),
    probes=(("reference_latent", CELL, {1 * 5 + 2}), ("pose_latents", CELL[:4] + (slice(2, 4),), {100 + 1 * 3 + 1})),
    pixels=None,
) | {"neither": Case(**VIDEO, calls=calls(60, (60, 5), (60, 5)))}

# the masks are added to the tokens of references and frames, and make none of their own
SCAIL_2 = {
    name: dataclasses.replace(case, options={**case.options, "ref_mask_latents": (7, frames, 8, 10)})
    for (name, case), frames in zip(SCAIL.items(), (5, 5, 3), strict=True)
}

DANCER = with_batch(
    VIDEO,
    latent=(3, 8, 8),  # its music takes an eighth of a frame's tokens at a time
    options={"audio_embed": (7, 35), "clip_fea": (257, 1280)},
    segments=(("main", 48, (3, 4, 4)),),
    calls=calls(48, (48, 257), (48, 5)),
    pixels=(64, 64, 9),
)


def build_dancer():
    return build("WanDancerModel", "model_wandancer", audio_inject_layers=[0], music_dim=256)()


def build_animate():
    model = build("AnimateWanModel", "model_animate", motion_encoder_dim=8, num_layers=2)()
    model.motion_encoder = torch.nn.Identity()  # 20 M parameters for pictures of faces
    return model


def build_humo():
    from comfy.ldm.wan.model import AudioProjModel

    model = build("HumoWanModel")()
    sizes = {"seq_len": 1, "blocks": 1, "channels": 4, "intermediate_dim": 8}
    model.audio_proj = AudioProjModel(**sizes, **default_operations())
    return model


FAMILIES = (
    family("wan", build("WanModel"), T2V),
    family("wan i2v", build("WanModel", model_type="i2v"), I2V),
    family("wan fun", build("WanModel", model_type="i2v", in_dim_ref_conv=4), FUN),
    family("wan vace", build("VaceWanModel", num_layers=4, vace_layers=2, vace_in_dim=6), VACE, VACE_SITES),
    family("wan camera", build("CameraWanModel", model_type="camera_2.2"), with_batch(VIDEO, calls=calls(60, (60, 5)))),
    family("wan s2v", build("WanModel_S2V", audio_dim=8, cond_dim=4, audio_inject_layers=[0]), S2V),
    family("wan humo", build_humo, HUMO),
    family("wan scail", build("SCAILWanModel"), SCAIL),
    family("wan scail 2", build("SCAIL2WanModel", mask_in_dim=7), SCAIL_2),
    family("wan dancer", build_dancer, DANCER),
    family("wan causal", build("CausalWanModel", "ar_model"), with_batch(VIDEO, calls=calls(60, (60, 5)))),
    family("wan animate", build_animate, with_batch(VIDEO, calls=calls(60, (60, 5), (60, 5)))),
)
