"""What shows and measures the pack and is not part of it: the demo, its models, the evidence, the benchmarks.

Everything runs as a module from the root of the checkout, such as `python -m lab.benchmarks.run`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `python -m` puts the checkout on the path, and its nodes/ would hide ComfyUI's nodes.py
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
