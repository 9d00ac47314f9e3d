"""MiniMax H3: text, guides or references, two channels of sound, then frames; batches of one only.

Guides of several frames, or with sound, exist where ComfyUI packs a guide by its own latents (after 0.33.0).
"""

import inspect

import pytest
import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "hidden_size": 64, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 32, "ffn_hidden_size": 48, "latents_dim": 4, "audio_latents_dim": 8, "text_dim": 16,
    "timestep_input_dim": 16, "time_embed_hidden_size": 16, "time_embed_dim": 16, "rope_inv_freq_len": 5,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")
SOUND = ("sound", 12, None)
MAIN = ("main", 60, (3, 4, 5))


def build(**config):
    def make():
        from comfy.ldm.minimax.model import MiniMaxH3Model

        model = MiniMaxH3Model(**{**CONFIG, **config}, **default_operations())
        model.rope.inv_freq.copy_(torch.logspace(0, -4, 5))  # a buffer, which checkpoints bring
        return model

    return make


def guides_have_latents():
    """Return whether this ComfyUI counts a guide by its latents; older ones make one frame of each."""
    from comfy.ldm.minimax.model import PackedLayout

    return "frame_count" not in inspect.signature(PackedLayout).parameters


def inputs(case):
    """Six latent frames of sound; `payload` and `guides` as ComfyUI's conditions make them, `latents` of its blocks."""
    if case.options.get("newer") and not guides_have_latents():
        pytest.skip("in this ComfyUI a guide is one frame")
    sound = case.options.get("sound", 6)
    extra = {"sound": noise(1, 8, 2, sound, seed=4), "guides": case.options.get("guides", ())}
    payload = dict(case.options.get("payload", {}))
    for name, shapes in case.options.get("latents", {}).items():
        extra[name] = [noise(1, *shape, seed=20 + i) for i, shape in enumerate(shapes)]
    return Inputs(noise(1, 4, *case.latent), noise(1, case.text, 16, seed=1), extra={**extra, "payload": payload})


def keyframes(guides, extra):
    """Return guides as the conditions hold them: each has the latents that the blocks are packed from."""
    videos, sounds = iter(extra.get("cond_video_latents", ())), iter(extra.get("cond_audio_latents", ()))
    return [
        {
            "resolved_frame_index": at,
            **({"latent": next(videos)} if "video" in parts else {}),
            **({"audio_latent": next(sounds)} if "sound" in parts else {}),
        }
        for at, *parts in guides
    ]


def forward(model, inputs, options):
    extra = dict(inputs.extra)
    sound, guides, payload = (extra.pop(name) for name in ("sound", "guides", "payload"))
    payload = payload | extra | {"visual_cond_noise_aug": 1.0}
    if guides:
        payload["keyframes"] = keyframes(guides, extra)
    video, _ = model(
        [inputs.latent, sound], torch.tensor([500.0]), context=inputs.text, control=None,
        transformer_options=options, minimax_payload=payload,
    )  # fmt: skip
    return video


def case(*before, latent=(3, 8, 10), main=MAIN, text=5, sound=SOUND, **more):
    segments = (("text", text, None), *before, sound, main)
    total = sum(length for _, length, _ in segments)
    calls = ((None, text, text), *((site, total, total) for site in SITES))
    return Case(latent=latent, text=text, segments=segments, calls=calls, **more)


def one_cell(frame, row, column):
    return (slice(None), slice(None), frame, slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))


IMAGE = {"kind": "image", "latent_h": 6, "latent_w": 8}
VIDEO = {"kind": "video_audio", "latent_t": 2, "latent_h": 4, "latent_w": 6, "ref_audio_t": 3}

CASES = {
    "plain": case(probes=(("text", (slice(None), 2), {2}), ("sound", (0, slice(None), 1, 2), {5 + 6 + 2}))),
    "odd": case(latent=(2, 9, 7), main=("main", 40, (2, 5, 4))),
    "planned": case(
        latent=(7, 8, 10),
        main=("main", 140, (7, 4, 5)),
        sound=("sound", 74, None),
        options={"sound": 37},
        pixels=(160, 128, 20),  # ComfyUI makes these 22, which are 37 latent frames of sound
    ),
    "first and last frame": case(
        ("reference", 20, None),
        ("reference", 20, None),
        options={
            "guides": ((0, "video"), (8, "video")),
            "payload": {"frame_count": 9},
            "latents": {"cond_video_latents": [(4, 1, 8, 10), (4, 1, 8, 10)]},
        },
        probes=(("cond_video_latents.1", one_cell(0, 1, 2), {5 + 20 + 5 + 2}),),
    ),
    "references": case(
        ("reference", 12, None),
        ("reference", 18, None),
        options={
            "payload": {"refs": [IMAGE, VIDEO]},
            "latents": {"cond_video_latents": [(4, 1, 6, 8), (4, 2, 4, 6)], "cond_audio_latents": [(8, 2, 3)]},
        },
        probes=(
            ("cond_video_latents.0", one_cell(0, 1, 2), {5 + 4 + 2}),
            ("cond_audio_latents.0", (0, slice(None), 1, 2), {17 + 3 + 2}),
            ("cond_video_latents.1", one_cell(1, 1, 2), {17 + 6 + 6 + 3 + 2}),
        ),
    ),
}

GUIDES = {
    "guide of two frames": case(
        ("reference", 40, None),
        options={"newer": True, "guides": ((0, "video"),), "latents": {"cond_video_latents": [(4, 2, 8, 10)]}},
        probes=(("cond_video_latents.0", one_cell(1, 1, 2), {5 + 20 + 5 + 2}),),
    ),
    "guide of sound": case(
        ("reference", 6, None),
        options={"newer": True, "guides": ((0, "sound"),), "latents": {"cond_audio_latents": [(8, 2, 3)]}},
        probes=(("cond_audio_latents.0", (0, slice(None), 1, 2), {5 + 3 + 2}),),
    ),
    "guides": case(
        *(("reference", length, None) for length in (60, 10, 6, 20)),
        latent=(3, 7, 9),
        options={
            "newer": True,
            "guides": ((0, "video", "sound"), (2, "sound"), (8, "video")),
            "latents": {
                "cond_video_latents": [(4, 3, 8, 10), (4, 1, 8, 10)],
                "cond_audio_latents": [(8, 2, 5), (8, 2, 3)],
            },
        },
        probes=(
            ("cond_video_latents.0", one_cell(2, 1, 2), {5 + 40 + 5 + 2}),
            ("cond_audio_latents.0", (0, slice(None), 1, 2), {5 + 60 + 5 + 2}),
            ("cond_audio_latents.1", (0, slice(None), 0, 1), {5 + 70 + 1}),
            ("cond_video_latents.1", one_cell(0, 1, 2), {5 + 76 + 5 + 2}),
        ),
    ),
}

FAMILIES = (
    Family(
        name="minimax h3",
        host="minimax_h3",
        build=build(),
        inputs=inputs,
        forward=forward,
        sites=SITES,
        heads=2,
        head_dim=32,
        patch=(1, 2, 2),
        cases={**CASES, **GUIDES},
        batches=False,
        oracle=build(token_refiner_num_layers=0),
    ),
)
