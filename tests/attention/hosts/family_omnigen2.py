"""OmniGen2: text, references, main grid, after refiners of each; two heads of queries share one of keys."""

from families import Case, Family, Inputs, default_operations, noise, through_apply_model

CONFIG = {
    "patch_size": 2, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (8, 4, 4), "text_feat_dim": 16,
}  # fmt: skip
SITES = ("blocks.0", "blocks.1")


def build(**config):
    def make():
        from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel

        return OmniGen2Transformer2DModel(**{**CONFIG, **config}, **default_operations())

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
    total = text + sum(counts) + main[1]
    refiners = [text, main[1], *([sum(counts)] if counts else [])]
    return Case(
        latent=latent, text=text, references=references,
        segments=(("text", text, None), *(("reference", count, None) for count in counts), main),
        calls=(*((None, n, n) for n in refiners), *((site, total, total) for site in SITES)), **more,
    )  # fmt: skip


def row_one(token):
    """A latent patch in row 1 of a reference, `token` columns from the left."""
    return (slice(None), slice(None), slice(2, 4), slice(2 * token, 2 * token + 2))


CASES = {
    "plain": case((18, 24), (1, 9, 12), pixels=(192, 144, 1), probes=(("text", (slice(None), 2), {2}),)),
    "odd": case((33, 27), (1, 17, 14), pixels=(216, 264, 1)),
    "long text": case((8, 8), (1, 4, 4), text=700),
    "as much text as picture": case((8, 8), (1, 4, 4), text=16),
    "batch 2": case((16, 10), (1, 8, 5), text=3, batch=2),
    "references": case(
        (16, 16),
        (1, 8, 8),
        text=4,
        references=((10, 13), (6, 8)),
        counts=(35, 12),
        probes=(
            ("text", (slice(None), 2), {2}),
            ("references.0", row_one(1), {4 + 7 + 1}),
            ("references.1", row_one(2), {39 + 4 + 2}),
        ),
    ),
}

FAMILIES = (
    Family(
        name="omnigen2",
        host="omnigen2",
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
