"""The list of candidates as a person writes it: `clear 16, foveated 0.15`."""

from ..planning.keep import LEAST_KEEP, spec_of_keep
from ..shown import quote
from ..specs import ClearSpec, Spec

USUAL = "clear 8, clear 16, clear 32, foveated 0.06, foveated 0.1, foveated 0.15, foveated 0.25, foveated 0.4"
MOST = 24


def read_candidates(text: str, *, is_clip: bool = False, on_gpu: bool = False) -> tuple[Spec, ...]:
    """Return the specs that a list names, each once.

    Args:
        text: `clear` with a radius in tokens, `foveated` with the share of keys that it keeps; commas between them.
        is_clip: whether the model makes clips.
        on_gpu: whether it runs on a GPU.

    Raises:
        ValueError: an entry cannot be read, there is none, or there are too many.
    """
    entries = [entry for entry in text.replace("，", ",").split(",") if entry.strip()]
    if not 0 < len(entries) <= MOST:
        raise ValueError(f"candidates are a list of 1 to {MOST}, such as {USUAL!r}; got {len(entries)}")
    return tuple(dict.fromkeys(_candidate(entry, is_clip, on_gpu) for entry in entries))


def _candidate(entry: str, is_clip: bool, on_gpu: bool) -> Spec:
    kind, _, number = entry.strip().lower().partition(" ")
    try:
        if kind == "clear":
            return ClearSpec(int(number))
        if kind == "foveated" and LEAST_KEEP <= float(number) < 1:
            return spec_of_keep(float(number), is_clip, on_gpu=on_gpu)
    except ValueError:
        pass
    raise ValueError(
        f"cannot read the candidate {quote(entry.strip())}; write clear with a radius in tokens, or foveated with the "
        f"share it keeps from {LEAST_KEEP:g} to below 1, as in {USUAL!r}"
    )
