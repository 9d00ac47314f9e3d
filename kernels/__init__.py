"""Triton kernels: tensors, tables and numbers in, tensors out. They know no tokens, models or nodes.

Importing this package imports no Triton; the files with kernels are imported when an operator first runs.
"""

from .capability import architecture, is_interpreted, refusal
from .clear import attend
from .clear_table import Table
from .foveated import foveated_attend
from .foveated_table import FoveatedTable
from .mapped import mapped_attend
from .state import FUSED_MAPS, GIVEN, LOGS, linear_state
from .tuning import Tile, tile_for

__all__ = [
    "FUSED_MAPS",
    "GIVEN",
    "LOGS",
    "FoveatedTable",
    "Table",
    "Tile",
    "architecture",
    "attend",
    "foveated_attend",
    "is_interpreted",
    "linear_state",
    "mapped_attend",
    "refusal",
    "tile_for",
]
