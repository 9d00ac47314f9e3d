"""Cosmos Predict2 and Anima: frames and nothing else."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 2, "mlp_ratio": 2.0,
    "crossattn_emb_channels": 16, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8,
}  # fmt: skip


def build(**config):
    def make():
        from comfy.ldm.cosmos.predict2 import MiniTrainDIT

        return MiniTrainDIT(**{**CONFIG, **config}, **default_operations())

    return make


def build_anima():
    from comfy.ldm.anima.model import Anima

    model = Anima(**{**CONFIG, "crossattn_emb_channels": 1024}, **default_operations())
    model.llm_adapter = torch.nn.Identity()  # 100 M parameters that have done their work before
    return model


def inputs(width):
    def make(case):
        return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, width, seed=1))

    return make


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 0.5)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options, fps=16)


def calls(tokens, text):
    """Each site, and after it the attention to the text."""
    return tuple(call for i in range(2) for call in ((f"blocks.{i}", tokens, tokens), (None, tokens, text)))


VIDEO = {"latent": (3, 8, 10), "segments": (("main", 60, (3, 4, 5)),)}

CASES = {
    "plain": Case(**VIDEO, calls=calls(60, 5), pixels=(80, 64, 9)),
    "batch 2": Case(**VIDEO, batch=2, calls=calls(60, 5)),
    "odd": Case(latent=(2, 9, 7), segments=(("main", 40, (2, 5, 4)),), calls=calls(40, 5), pixels=(56, 72, 5)),
    "a picture": Case(latent=(1, 8, 8), segments=(("main", 16, (1, 4, 4)),), calls=calls(16, 5), pixels=(64, 64, 1)),
    "as much text as video": Case(**VIDEO, text=60, calls=calls(60, 60)),
}

TWO_FRAMES = {
    "plain": Case(latent=(4, 8, 10), segments=(("main", 40, (2, 4, 5)),), calls=calls(40, 5), pixels=(80, 64, 13)),
    "odd": Case(latent=(3, 8, 10), segments=(("main", 40, (2, 4, 5)),), calls=calls(40, 5), pixels=(80, 64, 9)),
    "batch 2": Case(latent=(4, 8, 10), batch=2, segments=(("main", 40, (2, 4, 5)),), calls=calls(40, 5)),
}


def family(name, make, width, patch, cases):
    return Family(
        name=name, host="cosmos_predict2", build=make, inputs=inputs(width), forward=forward,
        sites=("blocks.0", "blocks.1"), heads=2, head_dim=32, patch=patch, cases=cases,
    )  # fmt: skip


FAMILIES = (
    family("cosmos predict2", build(), 16, (1, 2, 2), CASES),
    family("cosmos with long patches", build(patch_temporal=2), 16, (2, 2, 2), TWO_FRAMES),
    family("anima", build_anima, 1024, (1, 2, 2), CASES),
)
