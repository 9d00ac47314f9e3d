"""Small nodes for the demo: captions as conditioning and frames from latents, so that no large files are needed.

A pack of its own that only the demo links into ComfyUI, so that users' menus stay clean. The training of the models
imports its captions and latents, so ComfyUI is imported only when it asks for the nodes.
"""


async def comfy_entrypoint():
    """Return the extension that lists the demo's nodes."""
    from .extension import DemoExtension

    return DemoExtension()
