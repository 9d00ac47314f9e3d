"""LTX-Video with and without guides, and LTX-2 with sound."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "in_channels": 4, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
    "caption_channels": 16, "num_layers": 2,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")
GRID = ("main", 60, (3, 4, 5))


def build():
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(**CONFIG, **default_operations())


def build_sound():
    from comfy.ldm.lightricks.av_model import LTXAVModel

    return LTXAVModel(
        **CONFIG, audio_in_channels=128, audio_cross_attention_dim=32, audio_attention_head_dim=16,
        audio_num_attention_heads=2, connector_attention_head_dim=8, connector_num_attention_heads=2,
        connector_num_layers=1, **default_operations(),
    )  # fmt: skip


def inputs(case):
    """Take the references as guides; `gone` are the tokens of them that are left out, `strength` is theirs."""
    guides = [noise(case.batch, 4, *size, seed=9 + i) for i, size in enumerate(case.references)]
    latent, extra = noise(case.batch, 4, *case.latent), {}
    if guides:
        masks = [torch.ones(each[:, :1].shape) for each in (latent, *guides)]
        masks[-1].flatten(2)[..., list(case.options.get("gone", ()))] = -1.0
        counts = [guide[0, 0].numel() for guide in guides]
        extra = {
            "keyframe_idxs": torch.zeros(case.batch, 3, sum(counts), 2),
            "denoise_mask": torch.cat(masks, dim=2),
            "guide_attention_entries": [
                {"pre_filter_count": count, "strength": case.options.get("strength", 1.0)} for count in counts
            ],
        }
    return Inputs(latent, noise(case.batch, case.text, 16, seed=1), guides, extra)


def forward(model, inputs, options):
    """Guides are the last frames of the latent."""
    latent = torch.cat([inputs.latent, *inputs.references], dim=2)
    time = torch.full((latent.shape[0],), 0.5)
    if inputs.references:  # of each token
        time = torch.full((latent.shape[0], latent[0, 0].numel(), 1), 0.5)
    output = model(
        latent, time, context=inputs.text, control=None, transformer_options=options, attention_mask=None,
        frame_rate=25, **inputs.extra,
    )  # fmt: skip
    return output[:, :, : inputs.latent.shape[2]]


def sound_forward(model, inputs, options):
    """Video first, then 6 frames of sound, which has a width of its own."""
    batch = inputs.latent.shape[0]
    time, sound = torch.full((batch,), 0.5), noise(batch, 8, 6, 16, seed=4)
    text = inputs.text.repeat(1, 1, 2)  # for the video and for the sound
    video, _ = model(
        [inputs.latent, sound], (time, time), context=text, control=None, transformer_options=options, frame_rate=25,
        **inputs.extra,
    )  # fmt: skip
    return video


def calls(tokens, *others):
    """Each site, and after it the other attentions of its block, as (queries, keys)."""
    found = []
    for site in SITES:
        found.append((site, tokens, tokens))
        found += [(None, *each) for each in others]
    return tuple(found)


PLAIN = {"latent": (3, 4, 5), "segments": (GRID,), "pixels": (160, 128, 17)}
CELL = (slice(None), slice(None), 1, 2, 3)

CASES = {
    "plain": Case(**PLAIN, calls=calls(60, (60, 5))),
    "batch 2": Case(**PLAIN, batch=2, calls=calls(60, (60, 5))),
    "one frame": Case(
        latent=(1, 3, 7), segments=(("main", 21, (1, 3, 7)),), calls=calls(21, (21, 5)), pixels=(224, 96, 1)
    ),
    "as much text as video": Case(latent=(3, 4, 5), text=60, segments=(GRID,), calls=calls(60, (60, 60))),
    "guides": Case(
        latent=(3, 4, 5),
        references=((2, 4, 5), (2, 4, 5)),
        segments=(GRID, ("reference", 80, None)),
        calls=calls(140, (140, 5)),
        probes=(("references.0", CELL, {60 + 20 + 2 * 5 + 3}), ("references.1", CELL, {100 + 20 + 2 * 5 + 3})),
    ),
    "a guide in low resolution": Case(
        latent=(3, 4, 5),
        references=((2, 4, 5),),
        options={"gone": (0, 1, 2, 30, 39)},
        segments=(GRID, ("reference", 35, None)),
        calls=calls(95, (95, 5)),
        probes=(("references.0", CELL, {60 + 20 + 2 * 5 + 3 - 4}),),
    ),
}

# of each block: video, video to text, sound, sound to text, sound to video, video to sound
OTHERS = ((60, 5), (6, 6), (6, 5), (60, 6), (6, 60))
SOUND = {
    "plain": Case(**PLAIN, calls=calls(60, *OTHERS)),
    "batch 2": Case(**PLAIN, batch=2, calls=calls(60, *OTHERS)),
    "as much video as sound": Case(
        latent=(1, 2, 3), segments=(("main", 6, (1, 2, 3)),), calls=calls(6, (6, 5), (6, 6), (6, 5), (6, 6), (6, 6))
    ),
}


def family(name, make, forward, cases):
    return Family(
        name=name, host="ltx", build=make, inputs=inputs, forward=forward, sites=SITES, heads=2, head_dim=32,
        patch=(1, 1, 1), cases=cases,
    )  # fmt: skip


FAMILIES = (family("ltx", build, forward, CASES), family("ltx 2", build_sound, sound_forward, SOUND))
