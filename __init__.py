"""Linearize: linear-cost attention for diffusion transformers in ComfyUI.

ComfyUI calls `comfy_entrypoint`. Nothing of the pack is imported before that, so the mathematics
(`linearize.attention`) can be used without ComfyUI.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension that lists the pack's nodes."""
    from .nodes import LinearizeExtension

    return LinearizeExtension()
