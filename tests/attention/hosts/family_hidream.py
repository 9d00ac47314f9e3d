"""HiDream-I1: main grid, then the text of T5 and of two layers of Llama."""

import torch
from families import Case, Family, Inputs, default_operations, noise

LLAMA_TOKENS = 2
CONFIG = {
    "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "caption_channels": [16, 24], "text_emb_dim": 12, "num_routed_experts": 2,
    "num_activated_experts": 1, "axes_dims_rope": (16, 8, 8), "max_resolution": (32, 32), "llama_layers": [0, 1, 2, 2],
}  # fmt: skip


def build():
    from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(**CONFIG, **default_operations())


def inputs(case):
    """The text of a case is that of T5 and twice that of Llama."""
    extra = {
        "encoder_hidden_states_llama3": noise(case.batch, 3, LLAMA_TOKENS, 24, seed=2),
        "y": noise(case.batch, 12, seed=3),
    }
    text = noise(case.batch, case.text - 2 * LLAMA_TOKENS, 16, seed=1)
    return Inputs(noise(case.batch, 4, *case.latent), text, extra=extra)


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 0.5)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options, **inputs.extra)


def llama(layer, token):
    """The index of one token of one layer."""
    return (slice(None), layer, token)


CASES = {
    "plain": Case(
        latent=(18, 24),
        text=9,
        segments=(("main", 108, (1, 9, 12)), ("text", 9, None)),
        probes=(
            ("text", (slice(None), 2), {110}),
            # the first block reads layer 0 itself, and layer 2 as the last of all
            ("encoder_hidden_states_llama3", llama(0, 1), {108 + 5 + 2 + 1}),
            ("encoder_hidden_states_llama3", llama(2, 1), {108 + 5 + 1}),
            ("encoder_hidden_states_llama3", llama(1, 1), set()),
        ),
        pixels=(192, 144, 1),
    ),
    "odd": Case(
        latent=(33, 27), text=5, segments=(("main", 238, (1, 17, 14)), ("text", 5, None)), pixels=(216, 264, 1)
    ),
    "long text": Case(latent=(8, 8), text=700, segments=(("main", 16, (1, 4, 4)), ("text", 700, None))),
    "batch 2": Case(latent=(16, 10), text=7, batch=2, segments=(("main", 40, (1, 8, 5)), ("text", 7, None))),
}

FAMILIES = (
    Family(
        name="hidream",
        host="hidream",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("double.0", "double.1", "single.0", "single.1"),
        heads=2,
        head_dim=32,
        patch=(2, 2),
        cases=CASES,
    ),
)
