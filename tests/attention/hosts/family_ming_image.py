"""Ming-Image: text and what its encoder adds, then the layers of a picture, then reference frames; no pads.

A stand-in on this ComfyUI's own blocks. The order of the tokens was read in `comfy/ldm/lumina/model.py` of 0.38, whose
NextDiT takes `direct_context` and `ref_frames`.
"""

import functools

import torch
from families import Case, Family, Inputs, default_operations, each_site, noise

CONFIG = {
    "patch_size": 2, "in_channels": 4, "dim": 64, "cap_feat_dim": 24, "n_layers": 2, "qk_norm": True, "n_heads": 2,
    "n_kv_heads": 2, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512], "multiple_of": 8,
    "ffn_dim_multiplier": 1.0,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")


@functools.cache
def stand_in():
    from comfy.ldm.lumina.model import NextDiT

    class MingImage(NextDiT):
        def embedded(self, frames):
            """Tokens and positions of pictures (B, C, H, W), one picture after the other."""
            tokens, places = [], []
            for number, picture in enumerate(frames):
                patches = torch.nn.functional.unfold(picture, 2, stride=2).transpose(1, 2)
                rows, columns = picture.shape[-2] // 2, picture.shape[-1] // 2
                grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
                places.append(torch.nn.functional.pad(grid, (1, 0), value=9 + number))
                tokens.append(self.x_embedder(patches))
            return torch.cat(tokens, dim=1), torch.cat(places).float()

        def _forward(
            self, x, timesteps, context, num_tokens, attention_mask=None, direct_context=None, ref_frames=(),
            transformer_options=None, **_,
        ):  # fmt: skip
            time = self.t_embedder(1.0 - timesteps, dtype=x.dtype)
            text = self.cap_embedder(context)
            text = text if direct_context is None else torch.cat([text, direct_context], dim=1)
            images, places = self.embedded([*x.unbind(2), *ref_frames])
            own = torch.nn.functional.pad(torch.arange(text.shape[1])[:, None].float(), (0, 2))
            rope = [self.rope_embedder(each[None]).movedim(1, 2) for each in (own, places)]
            for layer in self.context_refiner:
                text = layer(text, None, rope[0], transformer_options=transformer_options)
            for layer in self.noise_refiner:
                images = layer(images, None, rope[1], time, transformer_options=transformer_options)
            joined, rope = torch.cat([text, images], dim=1), torch.cat(rope, dim=1)
            transformer_options["block_type"] = "double"
            for i, layer in enumerate(self.layers):
                transformer_options["block_index"] = i
                joined = layer(joined, None, rope, time, transformer_options=transformer_options)
            batch, channels, frames, height, width = x.shape
            found = self.final_layer(joined, time)[:, text.shape[1] :]
            found = found[:, : frames * height * width // 4].unflatten(1, (frames, -1)).transpose(2, 3)
            pictures = torch.nn.functional.fold(found.flatten(0, 1), (height, width), 2, stride=2)
            return pictures.unflatten(0, (batch, frames)).transpose(1, 2)

    return MingImage


def builder(refiners):
    def build():
        return stand_in()(**CONFIG, n_refiner_layers=refiners, **default_operations())

    return build


BUILD, ORACLE = builder(1), builder(0)


def inputs(case):
    references = [noise(case.batch, 4, *size, seed=9 + i) for i, size in enumerate(case.references)]
    added = {"direct_context": noise(case.batch, case.options["added"], 64, seed=3)} if case.options else {}
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 24, seed=1), references, added)


def forward(model, inputs, options):
    return model(
        inputs.latent, torch.full((inputs.latent.shape[0],), 0.5), inputs.text, inputs.text.shape[1],
        transformer_options=options, ref_frames=inputs.references, **inputs.extra,
    )  # fmt: skip


def calls(text, pictures):
    return ((None, text, text), (None, pictures, pictures), *each_site(SITES, text + pictures))


CASES = {
    "plain": Case(
        latent=(1, 10, 12),
        segments=(("text", 5, None), ("main", 30, (1, 5, 6))),
        calls=calls(5, 30),
        probes=(("text", (slice(None), 2), {2}),),
        pixels=(96, 80, 1),
    ),
    "layers": Case(
        latent=(3, 8, 6),
        options={"added": 4},
        segments=(("text", 9, None), ("main", 36, (3, 4, 3))),
        calls=calls(9, 36),
        probes=(("direct_context", (slice(None), 1), {5 + 1}),),
    ),
    "references": Case(
        latent=(2, 8, 6),
        references=((6, 8), (4, 4)),
        segments=(("text", 5, None), ("main", 24, (2, 4, 3)), ("reference", 12, None), ("reference", 4, None)),
        calls=calls(5, 40),
        probes=(("references.1", (slice(None), slice(None), slice(2, 4), slice(0, 2)), {5 + 24 + 12 + 2}),),
    ),
    "batch 2": Case(
        latent=(1, 8, 6), batch=2, segments=(("text", 5, None), ("main", 12, (1, 4, 3))), calls=calls(5, 12)
    ),
}

FAMILIES = (
    Family(
        name="ming_image",
        host="lumina2",
        build=BUILD,
        oracle=ORACLE,
        inputs=inputs,
        forward=forward,
        sites=SITES,
        heads=2,
        head_dim=32,
        patch=(1, 2, 2),
        cases=CASES,
    ),
)
