"""Triton kernels: tensors, tables and numbers in, tensors out. They know no tokens, models or nodes.

Importing this package imports no Triton; the files with kernels are imported when an operator first runs.
"""

from .capability import architecture, is_interpreted, refusal
from .clear import Table, attend
from .tuning import Tile, tile_for

__all__ = ["Table", "Tile", "architecture", "attend", "is_interpreted", "refusal", "tile_for"]
