"""One small node for the demo: a caption as conditioning, so that no text encoder of several gigabytes is needed.

A pack of its own that only the demo links into ComfyUI, so that users' menus stay clean.
"""

from comfy_api.latest import ComfyExtension, io

from .captions import encode_caption


class LinearizeDemoCaption(io.ComfyNode):
    """Conditioning for the demo's model, from a caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeDemoCaption",
            display_name="Demo Caption",
            category="linearize/demo",
            description="Conditioning for the demo's model, which knows lakes only.",
            inputs=[
                io.String.Input(
                    "caption",
                    default="dusk sun left mountains red house right pine left",
                    multiline=True,
                    tooltip="Time (day, dusk, night), sun or moon and where (left, middle, right), land (mountains, "
                    "hills, dunes), colour (red, blue, yellow, white) house and side, pine or oak on the other side.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        """Return the caption's tokens and pooled vector, a batch of one."""
        tokens, pooled = encode_caption(caption)
        return io.NodeOutput([[tokens[None], {"pooled_output": pooled[None]}]])


class DemoExtension(ComfyExtension):
    """The demo's node."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node class."""
        return [LinearizeDemoCaption]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension."""
    return DemoExtension()
