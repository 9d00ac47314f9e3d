"""Cosmos 1: frames and nothing else; its blocks are lists of layers."""

import torch
from families import Case, Family, Inputs, default_operations, noise

CONFIG = {
    "max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 2, "mlp_ratio": 2.0,
    "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "crossattn_emb_channels": 16, "use_cross_attn_mask": False,
    "pos_emb_cls": "rope3d", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 8,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip


def build():
    from comfy.ldm.cosmos.model import GeneralDIT

    return GeneralDIT(**CONFIG, **default_operations())


def inputs(case):
    return Inputs(noise(case.batch, 4, *case.latent), noise(case.batch, case.text, 16, seed=1))


def forward(model, inputs, options):
    time = torch.full((inputs.latent.shape[0],), 0.5)
    return model(inputs.latent, time, context=inputs.text, control=None, transformer_options=options, fps=None)


def calls(tokens, text):
    """Each site, and after it the attention to the text."""
    return tuple(call for i in range(2) for call in ((f"blocks.{i}", tokens, tokens), (None, tokens, text)))


VIDEO = {"latent": (3, 8, 10), "segments": (("main", 60, (3, 4, 5)),)}

CASES = {
    "plain": Case(**VIDEO, calls=calls(60, 5), pixels=(80, 64, 17)),
    "one frame": Case(latent=(1, 8, 8), segments=(("main", 16, (1, 4, 4)),), calls=calls(16, 5), pixels=(64, 64, 1)),
    "odd": Case(latent=(2, 10, 6), segments=(("main", 30, (2, 5, 3)),), calls=calls(30, 5), pixels=(48, 80, 9)),
    "as much text as video": Case(**VIDEO, text=60, calls=calls(60, 60)),
    "batch 2": Case(**VIDEO, batch=2, calls=calls(60, 5)),
}

FAMILIES = (
    Family(
        name="cosmos 1",
        host="cosmos",
        build=build,
        inputs=inputs,
        forward=forward,
        sites=("blocks.0", "blocks.1"),
        heads=2,
        head_dim=32,
        patch=(1, 2, 2),
        cases=CASES,
    ),
)
