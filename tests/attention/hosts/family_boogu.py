"""Boogu: OmniGen2's sequence, and in the double layers a second attention without the text."""

from families import Case, Family, Inputs, default_operations, noise, through_apply_model

CONFIG = {
    "patch_size": 2, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_double_stream_layers": 2,
    "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
    "axes_dim_rope": (8, 4, 4), "instruction_feat_dim": 16, "timestep_scale": 1.0,
}  # fmt: skip
SITES = ("double.0", "image.0", "double.1", "image.1", "single.0", "single.1")


def build(**config):
    def make():
        from comfy.ldm.boogu.model import BooguTransformer2DModel

        return BooguTransformer2DModel(**{**CONFIG, **config}, **default_operations())

    return make


def inputs(case):
    references = [noise(case.batch, 4, *size, seed=9 + i) for i, size in enumerate(case.references)]
    text = noise(case.batch, case.text, 16, seed=1)
    return Inputs(noise(case.batch, 4, *case.latent), text, references, {"num_tokens": case.text})


def forward(model, inputs, options):
    references = {"ref_latents": inputs.references} if inputs.references else {}
    return through_apply_model(model, inputs.latent, inputs.text, options, **references, **inputs.extra)


def case(latent, grid, text=5, references=(), counts=(), **more):
    """`counts` are the tokens of the references; the refiners see text, picture and references by themselves."""
    main = ("main", grid[1] * grid[2], grid)
    pictures = (*(("reference", count, None) for count in counts), main)
    seen = sum(counts) + main[1]
    refiners = [text, main[1], *([sum(counts)] if counts else [])]
    tokens = {site: seen if site.startswith("image") else seen + text for site in SITES}
    return Case(
        latent=latent, text=text, references=references, segments=(("text", text, None), *pictures),
        own_segments={"image.0": pictures, "image.1": pictures},
        calls=(*((None, n, n) for n in refiners), *((site, tokens[site], tokens[site]) for site in SITES)), **more,
    )  # fmt: skip


CASES = {
    "plain": case((18, 24), (1, 9, 12), pixels=(192, 144, 1), probes=(("text", (slice(None), 2), {2}),)),
    "odd": case((33, 27), (1, 17, 14), pixels=(216, 264, 1)),
    "as much text as picture": case((8, 8), (1, 4, 4), text=16),
    "batch 2": case((16, 10), (1, 8, 5), text=3, batch=2),
    "references": case(
        (16, 16),
        (1, 8, 8),
        text=4,
        references=((10, 13), (6, 8)),
        counts=(35, 12),
        probes=(
            ("references.0", (slice(None), slice(None), slice(2, 4), slice(2, 4)), {4 + 7 + 1}),
            ("references.1", (slice(None), slice(None), slice(2, 4), slice(4, 6)), {39 + 4 + 2}),
        ),
    ),
}

FAMILIES = (
    Family(
        name="boogu",
        host="boogu",
        build=build(),
        inputs=inputs,
        forward=forward,
        sites=SITES,
        heads=4,
        head_dim=16,
        patch=(2, 2),
        cases=CASES,
        oracle=build(num_refiner_layers=0),
    ),
)
