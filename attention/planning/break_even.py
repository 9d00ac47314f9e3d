"""From how many tokens on a kind of attention is faster than dense attention, on a machine that measured nothing yet.

CPU: the smallest sizes at which stored rows show a gain (suites clear-cpu, foveated-cpu, mapped-cpu), and the demo's
512 pixels, where none does. Other devices were not measured. Below 4096 tokens, FLUX at 1024 pixels, attention is a
small part of a step whatever computes it; foveated attention is predicted to be slower than dense there and faster at
2048 (lab/benchmarks/gpu.md).
"""

AUTO_TOKENS = -1  # as `min_tokens`: what `least_tokens` or a measurement says

_OTHERS = 4096
_CPU = {"hybrid": 7168, "chunked": 16384}
_GPU = {"foveated": 8192}


def least_tokens(device: str, kind: str) -> int:
    """Return the fewest tokens of a call that a kind is run at.

    Args:
        device: its type, as PyTorch names it.
        kind: of a spec.
    """
    return (_CPU if device == "cpu" else _GPU).get(kind, _OTHERS)
