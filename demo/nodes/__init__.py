"""Two small nodes for the demo and the tests: conditioning without a text encoder, a picture without a decoder.

A pack of its own that only the demo links into ComfyUI, so that users' menus stay clean.
"""

import hashlib

import torch
from comfy_api.latest import ComfyExtension, io


class LinearizeDemoText(io.ComfyNode):
    """Random conditioning that depends on nothing but its text and sizes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeDemoText",
            display_name="Demo Text",
            category="linearize/demo",
            description="Conditioning for the demo's tiny models, seeded by the text.",
            inputs=[
                io.String.Input(
                    "text", default="a small house", tooltip="Any text; another one gives another picture."
                ),
                io.Int.Input("tokens", default=256, min=0, max=4096, tooltip="Number of text tokens."),
                io.Int.Input(
                    "width", default=64, min=1, max=8192, tooltip="Numbers per token; the model's context width."
                ),
                io.Int.Input("pooled", default=32, min=1, max=8192, tooltip="Numbers of the pooled vector."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, tokens: int, width: int, pooled: int) -> io.NodeOutput:
        """Return seeded conditioning."""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(1, tokens, width, generator=generator)
        return io.NodeOutput([[tensor, {"pooled_output": torch.randn(1, pooled, generator=generator)}]])


class LinearizeDemoPicture(io.ComfyNode):
    """A latent as a picture by the model's own linear preview factors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeDemoPicture",
            display_name="Demo Picture",
            category="linearize/demo",
            description="Shows a latent of FLUX's format without a decoder, one pixel per latent cell, enlarged.",
            inputs=[
                io.Model.Input("model", tooltip="Gives the latent format."),
                io.Latent.Input("latent", tooltip="What came out of the sampler."),
                io.Int.Input("enlarge", default=4, min=1, max=16, tooltip="Pixels per latent cell."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, model, latent, enlarge: int) -> io.NodeOutput:
        """Return the picture."""
        latent_format = model.get_model_object("latent_format")
        samples = latent_format.process_in(latent["samples"]).float()
        factors = torch.tensor(latent_format.latent_rgb_factors)
        bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
        picture = (torch.einsum("bchw,cr->bhwr", samples, factors) + bias + 1) / 2
        picture = picture.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
        return io.NodeOutput(picture.clamp(0, 1))


class DemoExtension(ComfyExtension):
    """The demo's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [LinearizeDemoText, LinearizeDemoPicture]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension."""
    return DemoExtension()
