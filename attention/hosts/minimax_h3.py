"""MiniMax H3, video with sound.

Sequence: text, guides (a frame or a clip of the video's size, with or without sound), reference blocks, sound (two
channels), main grid (frames, rows, columns). All but the grid are global tokens, so the sound sees what it saw before.
The refiner of the text is never touched.

ComfyUI packs the sequence once per sampling run, and its own account of that is taken where it belongs to the call.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..layout import Reason, Segment, TokenLayout
from .base import Host, ModelCall, Site, grid_of, main_segment, missing_structure, numbered_sites, planned_main

PIXELS_PER_LATENT = 16
FRAMES_PER_SECOND, SOUND_PER_SECOND, SOUND_CHANNELS = 24, 40, 2
PERIOD_FRAMES, PERIOD_LATENTS = 17, 5  # after the first 5 frames, which are 2 latent frames
ROLES = {"text": "text", "audio": "sound"}  # of ComfyUI's names for runs of tokens; all others are references
STRUCTURE = (
    "video_patch_proj",
    "audio_patch_proj",
    "condition_proj",
    "token_refiner.blocks",
    "blocks.0.attn.qkv_proj",
    "blocks.0.attn.q_norm",
    "blocks.0.adaln_proj",
    "final_layer.video_out",
)


class MiniMaxH3Host(Host):
    """MiniMax H3: 50 blocks, head dimension 128."""

    name = "minimax_h3"
    title = "MiniMax H3"
    default_text_tokens = 256  # prompts are not padded

    def mismatch(self, module: Any) -> Reason | None:
        return missing_structure(self.title, module, STRUCTURE)

    def sites(self, module: Any) -> tuple[Site, ...]:
        attention = module.blocks[0].attn
        return numbered_sites("blocks", len(module.blocks), attention.heads, attention.head_dim)

    def site_modules(self, module: Any) -> dict[str, str]:
        return {f"blocks.{i}": f"blocks.{i}.attn" for i in range(len(module.blocks))}

    def layout(self, call: ModelCall) -> TokenLayout | Reason:
        """The latent is a video and its sound."""
        latents, text = call.argument(0, "x"), call.argument(2, "context")
        if not isinstance(latents, list) or len(latents) != 2 or getattr(text, "ndim", 0) != 3:
            return Reason(
                "arguments", f"{self.title} was called without the video, sound and text that tell its tokens"
            )
        video, sound = latents
        main = main_segment(video, call.module.patch_size)
        given = call.kwargs.get("minimax_payload") or {}
        told = _told(given.get("layout"), text.shape[1], sound.shape[-1], main)
        if told:
            return TokenLayout.of(told)
        _, rows, columns = grid_of(video, call.module.patch_size)
        guides = [each for guide in given.get("keyframes") or () for each in _guide(guide, rows * columns)]
        references = [Segment("reference", _tokens_of(block)) for block in given.get("refs") or ()]
        audio = Segment("sound", SOUND_CHANNELS * sound.shape[-1])
        return TokenLayout.of((Segment("text", text.shape[1]), *guides, *references, audio, main))

    def planned_layout(self, module: Any, width: int, height: int, frames: int, text_tokens: int) -> TokenLayout:
        """ComfyUI rounds a clip up to 5, 22, 39 and so on frames."""
        periods = max(math.ceil((frames - 5) / PERIOD_FRAMES), 0)
        seconds = (periods * PERIOD_FRAMES + 5) / FRAMES_PER_SECOND
        main = planned_main(width, height, PIXELS_PER_LATENT * module.patch_size[-1], periods * PERIOD_LATENTS + 2)
        sound = Segment("sound", SOUND_CHANNELS * round(seconds * SOUND_PER_SECOND))
        return TokenLayout.of((Segment("text", text_tokens), sound, main))

    def norm_parameters(self, module: Any) -> tuple[str, ...]:
        """The query norms of every block."""
        return tuple(f"{path}.q_norm.weight" for path in self.site_modules(module).values())


def _told(packed: Any, text: int, sound: int, main: Segment) -> list[Segment] | None:
    """Return the segments of the sequence that ComfyUI packed for this run, or None where it is another call's."""
    runs = [(kind, stop - start) for start, stop, kind in getattr(packed, "segments", ())]
    expected = [("text", text), ("audio", SOUND_CHANNELS * sound), ("video", main.length)]
    if [run for run in runs if run[0] in ("text", "audio", "video")] != expected or runs[-1] != expected[-1]:
        return None
    return [*(Segment(ROLES.get(kind, "reference"), length) for kind, length in runs[:-1]), main]


def _guide(guide: Mapping[str, Any], frame: int) -> Iterator[Segment]:
    """Yield the tokens of a guide: its frames, `frame` tokens each, then its sound.

    Versions of ComfyUI whose guides have neither latent nor sound of their own make one frame of each.
    """
    video, sound = guide.get("latent"), guide.get("audio_latent")
    if video is not None or sound is None:
        yield Segment("reference", frame * (1 if video is None else video.shape[2]))
    if sound is not None:
        yield Segment("reference", SOUND_CHANNELS * sound.shape[-1])


def _tokens_of(block: Mapping[str, Any]) -> int:
    """Return the tokens of a reference block: a picture, a sound, or a video with or without sound."""
    sound = SOUND_CHANNELS * block.get("ref_audio_t", 0)
    if block["kind"] == "audio":
        return sound
    return sound + block.get("latent_t", 1) * (block["latent_h"] // 2) * (block["latent_w"] // 2)
