"""Conditioning for the demo's models: a caption's words hashed to numbers, so that no encoder is needed."""

import hashlib
import re

import torch
from torch import Tensor

TOKENS, HALF = 12, 32  # words at most, and numbers per word


def encode_caption(caption: str) -> tuple[Tensor, Tensor]:
    """Return text tokens (TOKENS, 2 * HALF) and a pooled vector (2 * HALF,) of a caption.

    A token holds its word and the word before it: FLUX gives all text tokens one position, so without the second half
    "red house left" and "left house red" would be the same. Any word has a code; unknown ones are noise to a model.

    Raises:
        ValueError: the caption has more than TOKENS words.
    """
    words = re.findall(r"\w+", caption.lower())
    if len(words) > TOKENS:
        raise ValueError(f"the demo's models read {TOKENS} words, this caption has {len(words)}; leave some out")
    codes = [torch.zeros(HALF), *map(_code, words)]
    tokens = [torch.cat((codes[index + 1], codes[index])) for index in range(len(words))]
    pooled = torch.stack(tokens).sum(0) / len(words) ** 0.5 if tokens else torch.zeros(2 * HALF)
    return torch.stack([*tokens, *[torch.zeros(2 * HALF)] * (TOKENS - len(words))]), pooled


def _code(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return torch.randn(HALF, generator=torch.Generator().manual_seed(seed))
