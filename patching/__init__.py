"""What is put on a clone of a model: override, hooks, weights, receipt. Only here patchers are touched."""

from .install import part_of_sampling, patch_model, replaced_notes, rope_base_of, set_proportional_scale, set_rope_base
from .patcher import host_of, runtime_of

__all__ = [
    "host_of",
    "part_of_sampling",
    "patch_model",
    "replaced_notes",
    "rope_base_of",
    "runtime_of",
    "set_proportional_scale",
    "set_rope_base",
]
