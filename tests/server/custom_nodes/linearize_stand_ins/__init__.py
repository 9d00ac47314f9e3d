"""Stand-ins for text encoders and autoencoders, gigabytes each, so that shipped workflows run on tiny models.

A pack of its own that only the test server loads.
"""

import hashlib

import torch
from comfy_api.latest import ComfyExtension, io
from comfy_execution.graph_utils import GraphBuilder

TOKENS = 12
GRAY_TO_WHITE = 4.0  # standard deviations of a latent between black and white


class LinearizeTestText(io.ComfyNode):
    """Seeded noise as conditioning: the same text gives the same tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeTestText",
            category="linearize/test",
            inputs=[
                io.String.Input("text"),
                io.Int.Input("width", min=1, max=65536),
                io.Int.Input("pooled_width", min=0, max=65536),
                io.Boolean.Input("mask", default=False),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, width: int, pooled_width: int, mask: bool) -> io.NodeOutput:
        """Return tokens, a pooled vector, and a mask that hides nothing, of a batch of one."""
        return io.NodeOutput(Encoder(width, pooled_width, mask).encode_from_tokens_scheduled(text))


class LinearizeTestEncoder(io.ComfyNode):
    """The same as a text encoder, for nodes that read many prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeTestEncoder",
            category="linearize/test",
            inputs=[io.Int.Input("width", min=1, max=65536)],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, width: int) -> io.NodeOutput:
        """Return the encoder."""
        return io.NodeOutput(Encoder(width))


class Encoder:
    """What the core's nodes call of a text encoder."""

    def __init__(self, width: int, pooled_width: int = 0, mask: bool = False) -> None:
        self.width, self.pooled_width, self.mask = width, pooled_width, mask

    def tokenize(self, text: str) -> str:
        """Return the text."""
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        """Return the CONDITIONING of a text, a batch of one."""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        extra = {}
        if self.pooled_width:
            extra["pooled_output"] = torch.randn(1, self.pooled_width, generator=generator)
        if self.mask:
            extra["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
        return [[torch.randn(1, TOKENS, self.width, generator=generator), extra]]


class LinearizeTestAutoencoder(io.ComfyNode):
    """Seeded noise as latents, for nodes that encode pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeTestAutoencoder",
            category="linearize/test",
            inputs=[io.Boolean.Input("clips")],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, clips: bool) -> io.NodeOutput:
        """Return the autoencoder."""
        return io.NodeOutput(Autoencoder(clips))


class Autoencoder:
    """What the core's nodes call of an autoencoder: 16 channels, an eighth of a side, a quarter of the frames."""

    def __init__(self, clips: bool) -> None:
        self.clips = clips

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the latent of pictures (frames, height, width, 3): (B, 16, ...), one clip or as many as pictures."""
        frames, height, width = pixels.shape[:3]
        shape = (1, 16, (frames - 1) // 4 + 1) if self.clips else (frames, 16)
        return torch.randn(*shape, height // 8, width // 8, generator=torch.Generator().manual_seed(frames))


class LinearizeTestDecode(io.ComfyNode):
    """The first three channels of a latent as pictures, one per latent frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeTestDecode",
            category="linearize/test",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        """Return pictures (frames, height, width, 3), twice as large so that codecs take odd sizes."""
        latent = samples["samples"]
        frames = latent[0].movedim(0, 1) if latent.ndim == 5 else latent
        pictures = frames[:, :3].movedim(1, -1).float() / GRAY_TO_WHITE + 0.5
        larger = pictures.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return io.NodeOutput(larger.clamp(0, 1))


class LinearizeTestExpand(io.ComfyNode):
    """A node that becomes ComfyUI's sampler while the prompt runs, as loops and other packs' samplers do."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return inputs and outputs."""
        return io.Schema(
            node_id="LinearizeTestExpand",
            category="linearize/test",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent_image"),
                io.Int.Input("seed", min=0, max=2**31),
            ],
            outputs=[io.Latent.Output()],
            enable_expand=True,
        )

    @classmethod
    def execute(cls, model, positive: list, latent_image: dict, seed: int) -> io.NodeOutput:
        """Return the sampler that takes this node's place."""
        graph = GraphBuilder()
        sampler = graph.node(
            "KSampler", model=model, seed=seed, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=positive, negative=positive, latent_image=latent_image, denoise=1.0,
        )  # fmt: skip
        return io.NodeOutput(sampler.out(0), expand=graph.finalize())


class StandIns(ComfyExtension):
    """The nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [
            LinearizeTestText, LinearizeTestEncoder, LinearizeTestAutoencoder, LinearizeTestDecode, LinearizeTestExpand,
        ]  # fmt: skip


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension."""
    return StandIns()
