"""Guides of MiniMax H3: what they add to the sequence, in any version of ComfyUI, and as ComfyUI itself packs it."""

import pytest
import torch
from families import collect
from family_minimax_h3 import guides_have_latents

from linearize.attention.hosts.base import ModelCall
from linearize.attention.hosts.minimax_h3 import MiniMaxH3Host

FAMILY = next(family for family in collect() if family.name == "minimax h3")
FRAME = torch.zeros(1, 4, 1, 8, 10)
CLIP = torch.zeros(1, 4, 3, 8, 10)
SOUND = torch.zeros(1, 8, 2, 7)
GUIDES = {
    "no latent": ({"resolved_frame_index": 0}, [20]),
    "frame": ({"resolved_frame_index": 0, "latent": FRAME}, [20]),
    "clip": ({"resolved_frame_index": 0, "latent": CLIP}, [60]),
    "sound": ({"resolved_frame_index": 4, "audio_latent": SOUND}, [14]),
    "no frame, sound": ({"resolved_frame_index": 4, "latent": None, "audio_latent": SOUND}, [14]),
    "clip and sound": ({"resolved_frame_index": 0, "latent": CLIP, "audio_latent": SOUND}, [60, 14]),
}
REFERENCE = {"kind": "video_audio", "latent_t": 2, "latent_h": 4, "latent_w": 6, "ref_audio_t": 3}


def layout(model, **payload):
    """The layout of a clip of (3, 8, 10) cells, 5 tokens of text and 6 latent frames of sound."""
    latents = [torch.zeros(1, 4, 3, 8, 10), torch.zeros(1, 8, 2, 6)]
    call = ModelCall(model, (latents, torch.ones(1), torch.zeros(1, 5, 16)), {"minimax_payload": payload})
    found = MiniMaxH3Host().layout(call)
    return [(segment.role, segment.length, segment.grid) for segment in found.segments]


def expected(*lengths):
    references = [("reference", length, None) for length in lengths]
    return [("text", 5, None), *references, ("sound", 12, None), ("main", 60, (3, 4, 5))]


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_has_the_tokens_of_its_own_latents(name, tiny):
    guide, lengths = GUIDES[name]
    assert layout(tiny(FAMILY), keyframes=[guide]) == expected(*lengths)


def test_guides_come_in_their_order_and_before_references(tiny):
    guides, lengths = zip(*GUIDES.values(), strict=True)
    found = layout(tiny(FAMILY), keyframes=list(guides), refs=[REFERENCE])
    assert found == expected(*(each for some in lengths for each in some), 6 + 12)


def packed(text=5, **conditions):
    from comfy.ldm.minimax.model import PackedLayout

    return PackedLayout(text, 3, 8, 10, 6, **conditions)


def test_the_sequence_is_the_one_that_comfyui_packs(tiny):
    """Newer versions also show it to attention patches, as `minimax_h3_layout` in the transformer options."""
    if not guides_have_latents():
        pytest.skip("in this ComfyUI a guide is one frame")
    given = {"keyframes": [guide for guide, _ in list(GUIDES.values())[1:]], "refs": [REFERENCE]}
    theirs = packed(**given)
    lengths = [stop - start for start, stop, _ in theirs.segments]
    assert sum(lengths) == sum(length for _, length, _ in layout(tiny(FAMILY), **given))
    assert layout(tiny(FAMILY), **given, layout=theirs) == expected(*lengths[1:-2])


def test_a_packed_sequence_of_another_call_is_left_aside(tiny):
    given = {"keyframes": [GUIDES["frame"][0]]}
    other = packed(text=6, refs=[{"kind": "image", "latent_h": 6, "latent_w": 8}])
    assert layout(tiny(FAMILY), **given, layout=other) == expected(20)


def test_runs_of_tokens_that_nobody_knows_yet_are_global(tiny):
    runs = [(0, 5, "text"), (5, 14, "of a newer version"), (14, 26, "audio"), (26, 86, "video")]
    other = type("PackedLayout", (), {"segments": runs})
    assert layout(tiny(FAMILY), layout=other) == expected(9)
