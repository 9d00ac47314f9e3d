"""The demo's nodes: captions as conditioning and frames from latents."""

import torch.nn.functional as F
from comfy_api.latest import ComfyExtension, io

from .captions import encode_caption
from .clip_latents import clips_of, of_comfyui


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
        return io.NodeOutput(CaptionEncoder().encode_from_tokens_scheduled(caption))


class LinearizeDemoTextEncoder(io.ComfyNode):
    """The same as a text encoder, for nodes that read many prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeDemoTextEncoder",
            display_name="Demo Text Encoder",
            category="linearize/demo",
            description="Reads captions for the demo's model; see Demo Caption for its words.",
            inputs=[],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Return the encoder."""
        return io.NodeOutput(CaptionEncoder())


class LinearizeDemoClipDecode(io.ComfyNode):
    """Frames from latents of the demo's video model, so that no video autoencoder is needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeDemoClipDecode",
            display_name="Demo Clip Decode",
            category="linearize/demo",
            description="Frames of the demo's video model, which knows a ball, a tower and their mirror only.",
            inputs=[io.Latent.Input("samples", tooltip="Latents of 17 frames at 256 x 192 pixels.")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        """Return the frames of all clips one after another, 8 pixels per latent cell."""
        clips = clips_of(of_comfyui(samples["samples"].float().cpu()))
        frames = F.interpolate(clips.transpose(1, 2).flatten(0, 1), scale_factor=4, mode="bicubic")
        return io.NodeOutput(frames.clamp(0, 1).permute(0, 2, 3, 1))


class CaptionEncoder:
    """What the core's nodes call of a text encoder."""

    def tokenize(self, text: str) -> str:
        """Return the text: its words are its tokens."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        """Return the CONDITIONING of a caption, a batch of one."""
        encoded, pooled = encode_caption(tokens)
        return [[encoded[None], {"pooled_output": pooled[None]}]]


class DemoExtension(ComfyExtension):
    """The demo's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [LinearizeDemoCaption, LinearizeDemoTextEncoder, LinearizeDemoClipDecode]
