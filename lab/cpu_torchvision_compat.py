"""Lets torchvision be imported beside a CPU build of torch; `run.py` installs it in .venv.

torchvision has no CPU build: its compiled operators fail to load, and registering their fakes then fails too. Declaring
two schemas before it is imported is enough for the pure Python parts that ComfyUI uses.
"""

import importlib.abc
import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Finder(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first looked for, then steps aside."""

    def find_spec(self, name, path=None, target=None):
        """Return None: the usual finders go on."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for op in ("torchvision::nms", "torchvision::qnms"):
                torch.library.define(op, SCHEMA)
        return None


sys.meta_path.insert(0, Finder())
