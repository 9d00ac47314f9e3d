"""CogVideoX 1.0 and 1.5: text, then frames."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "num_attention_heads": 3, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 9,
}  # fmt: skip


def build(**config):
    def make():
        from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel(**CONFIG, **config, **default_operations())

    return make


def inputs(case):
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 16, seed=1))


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 500.0)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options)


def case(latent, grid, text=5, **more):
    segments = (("text", text, None), ("main", grid[0] * grid[1] * grid[2], grid))
    return Case(latent=latent, text=text, segments=segments, probes=(("text", (slice(None), 2), {2}),), **more)


CASES = {
    "plain": case((3, 8, 10), (3, 4, 5), pixels=(80, 64, 9)),
    "odd": case((2, 9, 7), (2, 5, 4), pixels=(56, 72, 5)),
    "one frame": case((1, 8, 8), (1, 4, 4), pixels=(64, 64, 1)),
    "long text": case((1, 8, 8), (1, 4, 4), text=700),
    "batch 2": case((3, 8, 10), (3, 4, 5), text=3, batch=2),
}
TWO_FRAMES = {
    "plain": case((4, 8, 10), (2, 4, 5), pixels=(80, 64, 13)),
    "odd": case((3, 9, 10), (2, 5, 5), pixels=(80, 72, 9)),
    "batch 2": case((4, 8, 10), (2, 4, 5), text=3, batch=2),
}


def family(name, make, patch, cases):
    return Family(
        name=name, host="cogvideox", build=make, inputs=inputs, forward=forward, sites=("blocks.0", "blocks.1"),
        heads=3, head_dim=32, patch=patch, cases=cases,
    )  # fmt: skip


FAMILIES = (
    family("cogvideox", build(), (1, 2, 2), CASES),
    family("cogvideox 1.5", build(patch_size_t=2, use_rotary_positional_embeddings=True), (2, 2, 2), TWO_FRAMES),
)
