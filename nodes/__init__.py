"""The nodes ComfyUI shows. Each builds a configuration, calls one function and returns; ids are for ever."""

from comfy_api.latest import ComfyExtension, io

from .clear import LinearizeCLEAR
from .model_files import register_folder
from .report import LinearizeReport

register_folder()


class LinearizeExtension(ComfyExtension):
    """The pack, in the order of its menu."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [LinearizeCLEAR, LinearizeReport]
