"""Tokens that a patch of another node joins to a model's text, such as a style reference (USO).

Such patches run inside the forward, after its layout was told. Two patches around them note by how many tokens the
text grew. A patch that changes the picture's tokens is not followed: where its tokens lie, nobody tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import Segment, TokenLayout

NOTES_KEY = "linearize_joined_tokens"
PATCHES_KEY, JOINING = "patches", "post_input"


@dataclass(slots=True)
class JoinedTokens:
    """What the patches of one forward joined to its text.

    Args:
        before: tokens of text and picture that the first patch was given.
        count: by how many tokens the text grew; 0 where the picture changed too.
    """

    before: tuple[int, int] | None = None
    count: int = 0

    def added_to(self, layout: TokenLayout) -> TokenLayout:
        """Return the layout with the joined tokens at its text; they are global, as the text is."""
        if self.count < 1:
            return layout
        roles = [segment.role for segment in layout.segments]
        if "text" not in roles:
            return layout
        at = roles.index("text")
        return TokenLayout.of((*layout.segments[:at], Segment("reference", self.count), *layout.segments[at:]))


def watch_joined(options: dict[str, Any], notes: JoinedTokens) -> dict[str, Any]:
    """Return a copy of the transformer options in which `notes` learns what the patches of this forward join."""
    patches = options.get(PATCHES_KEY) or {}
    joining = [patch for patch in patches.get(JOINING) or () if patch not in (_note_before, _note_after)]
    if not joining:
        return options
    around = [_note_before, *joining, _note_after]
    return {**options, NOTES_KEY: notes, PATCHES_KEY: {**patches, JOINING: around}}


# the same two functions at every forward, since a compiled model is traced anew for new ones
@torch.compiler.disable
def _note_before(args: dict[str, Any]) -> dict[str, Any]:
    notes = args.get("transformer_options", {}).get(NOTES_KEY)
    if notes is not None:
        notes.before, notes.count = _lengths(args), 0
    return args


@torch.compiler.disable
def _note_after(args: dict[str, Any]) -> dict[str, Any]:
    notes, after = args.get("transformer_options", {}).get(NOTES_KEY), _lengths(args)
    if notes is not None and notes.before is not None and after is not None and after[1] == notes.before[1]:
        notes.count = after[0] - notes.before[0]
    return args


def _lengths(args: Mapping[str, Any]) -> tuple[int, int] | None:
    shapes: list[tuple[int, ...]] = [tuple(getattr(args.get(name), "shape", ())) for name in ("txt", "img")]
    return (shapes[0][1], shapes[1][1]) if all(len(shape) == 3 for shape in shapes) else None
