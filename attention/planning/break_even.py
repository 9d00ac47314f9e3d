"""From how many tokens on a kind of attention is faster than dense attention, on a machine that measured nothing yet.

CPU: the smallest sizes at which stored rows show a gain (suites clear-cpu, foveated-cpu, mapped-cpu), and the demo's
512 pixels, where none does. Other devices were not measured: below 4096 tokens, FLUX at 1024 pixels, attention is a
small part of a step whatever computes it.
"""

AUTO_TOKENS = -1  # as `min_tokens`: what `least_tokens` or a measurement says

_OTHERS = 4096
_CPU = {"hybrid": 7168, "chunked": 16384}


def least_tokens(device: str, kind: str) -> int:
    """Return the fewest tokens of a call that a kind is run at.

    Args:
        device: its type, as PyTorch names it.
        kind: of a spec.
    """
    return _CPU.get(kind, _OTHERS) if device == "cpu" else _OTHERS
