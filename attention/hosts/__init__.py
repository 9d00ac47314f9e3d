"""The architectures the pack knows, in the order they are tried. A new one is one file and one entry here."""

import logging
from typing import Any

from .auraflow import AuraFlowHost
from .base import Host, ModelCall, Site, WeightTarget
from .boogu import BooguHost
from .chroma import ChromaHost
from .cogvideox import CogVideoXHost
from .cosmos import CosmosHost
from .cosmos_predict2 import CosmosPredict2Host
from .entry_points import why_unseen
from .flux import FluxHost
from .flux2 import Flux2Host
from .hidream import HiDreamHost
from .hunyuan_video import HunyuanVideoHost
from .ideogram4 import Ideogram4Host
from .joyimage import JoyImageHost
from .kandinsky5 import Kandinsky5Host
from .kandinsky6 import Kandinsky6Host
from .krea2 import Krea2Host
from .lens import LensHost
from .ltx import LTXHost
from .lumina import LuminaHost
from .mage_flow import MageFlowHost
from .minimax_h3 import MiniMaxH3Host
from .mochi import MochiHost
from .omnigen2 import OmniGen2Host
from .pixeldit import PixelDiTHost
from .qwen_image import QwenImageHost
from .sd3 import SD3Host
from .unhookable import why_unhookable
from .wan import WanHost

HOSTS: tuple[Host, ...] = (
    FluxHost(),
    Flux2Host(),
    ChromaHost(),
    QwenImageHost(),
    MageFlowHost(),
    LuminaHost(),
    HunyuanVideoHost(),
    Kandinsky5Host(),
    Kandinsky6Host(),
    Krea2Host(),
    LensHost(),
    JoyImageHost(),
    WanHost(),
    SD3Host(),
    LTXHost(),
    HiDreamHost(),
    CosmosPredict2Host(),
    CosmosHost(),
    CogVideoXHost(),
    AuraFlowHost(),
    MochiHost(),
    OmniGen2Host(),
    BooguHost(),
    Ideogram4Host(),
    MiniMaxH3Host(),
    PixelDiTHost(),
)

log = logging.getLogger("linearize")

__all__ = ["HOSTS", "Host", "ModelCall", "Site", "WeightTarget", "find_host"]


def find_host(module: Any) -> Host:
    """Return the host of a diffusion model.

    Raises:
        ValueError: no host can serve it: the sentence says why; or none knows it: the sentence lists those there are.
    """
    sentence = why_unhookable(module)
    if sentence:
        raise ValueError(sentence)
    reasons = []
    for host in HOSTS:
        reason = host.mismatch(module)
        if reason is None:
            unseen = why_unseen(host, module)
            if unseen:
                name = f"{type(module).__name__}, built like {host.title}"
                raise ValueError(f"Linearize cannot work on this model ({name}): {unseen}")
            return host
        reasons.append(reason.text)
    log.info("Linearize: no host for %s: %s", type(module).__name__, "; ".join(reasons))
    known = ", ".join(host.title for host in HOSTS)
    raise ValueError(f"Linearize does not know this model ({type(module).__name__}); it works on: {known}")
