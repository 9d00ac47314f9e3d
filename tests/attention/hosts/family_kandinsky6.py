"""Kandinsky 6: the frames, and the start picture behind them; sound and text in attentions of their own.

A stand-in on this ComfyUI's Kandinsky 5 blocks, which Kandinsky 6 is made of. Names, calls and arguments were read in
a copy of `comfy/ldm/kandinsky6/model.py`.
"""

import functools

import torch
from families import Case, Family, Inputs, default_operations, noise
from torch import nn

SITES = ("blocks.0", "blocks.1")
SOUND = 7  # latent frames of sound


@functools.cache
def stand_in():
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.kandinsky5 import model as core
    from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

    settings = {"operation_settings": default_operations()}

    def encoder(width):
        return core.TransformerEncoderBlock(width, 16, 32, 16, **settings)

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.videoT = core.TransformerDecoderBlock(32, 16, 32, 16, **settings)
            self.audioT = core.TransformerDecoderBlock(16, 16, 32, 16, **settings)
            self.va_cross_attention = core.CrossAttention(32, 16, **settings)
            self.widen = nn.Linear(16, 32)

        def forward(self, video, sound, texts, ropes, transformer_options):
            video = video + self.videoT.self_attention(
                self.videoT.self_attention_norm(video), ropes[0], transformer_options=transformer_options
            )
            video = video + self.videoT.cross_attention(video, texts[0], transformer_options=transformer_options)
            sound = sound + self.audioT.self_attention(sound, ropes[1], transformer_options=transformer_options)
            sound = sound + self.audioT.cross_attention(sound, texts[1], transformer_options=transformer_options)
            video = video + self.va_cross_attention(video, self.widen(sound), transformer_options=transformer_options)
            return video + self.videoT.feed_forward(video), sound

    class Kandinsky6(nn.Module):
        patch_size = (1, 2, 2)

        def __init__(self):
            super().__init__()
            self.visual_embeddings = core.VisualEmbeddings(16, 32, self.patch_size, **settings)
            self.audio_embeddings = nn.Linear(6, 16)
            self.video_text_embeddings, self.audio_text_embeddings = nn.Linear(24, 32), nn.Linear(24, 16)
            self.video_text_transformer_blocks = nn.ModuleList([encoder(32)])
            self.visual_blocks = nn.ModuleList([Fused(), Fused()])
            self.rope_embedder_3d = EmbedND(dim=16, theta=100.0, axes_dim=[4, 6, 6])
            self.out_layer = nn.Linear(32, 16)

        def rope(self, *axes):
            places = torch.cartesian_prod(*(torch.arange(size).float() for size in axes)).view(-1, len(axes))
            return self.rope_embedder_3d(nn.functional.pad(places, (3 - len(axes), 0))[None]).movedim(1, 2)

        def forward(self, *args, **kwargs):
            wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, kwargs["transformer_options"])
            return WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute(*args, **kwargs)

        def _forward(
            self, x, timestep, context, y=None, control=None, transformer_options=None, k6_reference_tail=False
        ):
            video = self.visual_embeddings(x[0])
            shape = video.shape[1:4]
            places = self.rope(shape[0] - k6_reference_tail, *shape[1:])
            if k6_reference_tail:
                places = torch.cat([places, places[:, : shape[1] * shape[2]]], dim=1)
            sound, texts = self.audio_embeddings(x[1]), [self.video_text_embeddings(context)]
            for block in self.video_text_transformer_blocks:
                time = torch.zeros(1, 16)
                texts = [block(texts[0], time, self.rope(context.shape[1]), transformer_options=transformer_options)]
            texts.append(self.audio_text_embeddings(context))
            video, ropes = video.flatten(1, 3), (places, self.rope(SOUND))
            for i, block in enumerate(self.visual_blocks):
                transformer_options["block_index"] = i
                video, sound = block(video, sound, texts, ropes, transformer_options=transformer_options)
            found = self.out_layer(video).unflatten(1, shape).unflatten(-1, (4, 2, 2))
            return found.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4), sound

    return Kandinsky6


def build():
    return stand_in()()


def inputs(case):
    extra = {"sound": noise(case.batch, SOUND, 6, seed=4)}
    if case.options.get("start picture"):
        extra["start"] = noise(case.batch, 4, 1, *case.latent[1:], seed=5)
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 24, seed=1), [], extra)


def forward(model, inputs, options):
    extra, time = dict(inputs.extra), torch.full((inputs.latent.shape[0],), 0.5)
    sound, start = extra.pop("sound"), extra.pop("start", None)
    video = inputs.latent if start is None else torch.cat([inputs.latent, start], dim=2)
    found, _ = model(
        [video, sound], time, context=inputs.text, control=None, transformer_options=options,
        k6_reference_tail=start is not None,
    )  # fmt: skip
    return found[:, :, : inputs.latent.shape[2]]


def calls(text, tokens):
    """The text block first; behind each site cross-attention, the sound's two, and attention to the sound."""
    others = ((None, tokens, text), (None, SOUND, SOUND), (None, SOUND, text), (None, tokens, SOUND))
    return ((None, text, text), *(call for site in SITES for call in ((site, tokens, tokens), *others)))


CASES = {
    "plain": Case(latent=(3, 10, 8), segments=(("main", 60, (3, 5, 4)),), calls=calls(5, 60), pixels=(64, 80, 9)),
    "start picture": Case(
        latent=(3, 6, 8),
        options={"start picture": True},
        segments=(("main", 36, (3, 3, 4)), ("reference", 12, None)),
        calls=calls(5, 48),
        probes=(("start", (slice(None), slice(None), 0, slice(2, 4), slice(4, 6)), {36 + 4 + 2}),),
    ),
    "as many tokens of sound": Case(
        latent=(1, 2, 14), text=7, segments=(("main", 7, (1, 1, 7)),), calls=calls(7, 7), pixels=(112, 16, 1)
    ),
    "batch 2": Case(latent=(2, 6, 8), text=3, batch=2, segments=(("main", 24, (2, 3, 4)),), calls=calls(3, 24)),
}

FAMILIES = (
    Family(
        name="kandinsky6",
        host="kandinsky6",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=SITES,
        heads=2,
        head_dim=16,
        patch=(1, 2, 2),
        cases=CASES,
    ),
)
