"""A small FLUX-like transformer as a trainee, without ComfyUI: two streams, then one, and residuals added in place."""

import torch
import torch.nn.functional as F
from torch import nn

from linearize.attention.hosts.base import ModelCall
from linearize.attention.hosts.flux import FluxHost
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import OVERRIDE_KEY, AttentionOverride
from linearize.attention.runtime.runtime import RUNTIME_KEY, Runtime
from linearize.training.finetune.roles import Roles

HEADS, SIZE, TEXT, CHANNELS = 2, 8, 3, 4
WIDTH = HEADS * SIZE


def dense(q, k, v, heads, **_):
    output = F.scaled_dot_product_attention(q, k, v)
    return output.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def attention(q, k, v, options):
    return options[OVERRIDE_KEY](dense, q, k, v, HEADS, skip_reshape=True, transformer_options=options)


def heads(x):
    return x.reshape(x.shape[0], x.shape[1], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm = nn.LayerNorm(SIZE)

    def forward(self, q, k):
        return self.query_norm(q) * 1.5, self.query_norm(k) * 1.5


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Norm()


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_attn, self.txt_attn, self.mlp = Stream(), Stream(), nn.Linear(WIDTH, WIDTH)

    def forward(self, img, txt, transformer_options):
        parts = []
        for stream, x in ((self.txt_attn, txt), (self.img_attn, img)):
            q, k, v = heads(stream.qkv(F.layer_norm(x, (WIDTH,))))
            parts.append((*stream.norm(q, k), v))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        output = attention(q, k, v, transformer_options)
        img += self.img_attn.proj(output[:, txt.shape[1] :])
        img += self.mlp(F.layer_norm(img, (WIDTH,)).pow(2))
        txt.add_(self.txt_attn.proj(output[:, : txt.shape[1]]))
        txt[:, :2].mul_(0.9)
        return img, txt


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), Norm()

    def forward(self, x, transformer_options):
        qkv, mlp = self.linear1(F.layer_norm(x, (WIDTH,))).split((3 * WIDTH, WIDTH), dim=-1)
        q, k, v = heads(qkv)
        output = attention(*self.norm(q, k), v, transformer_options)
        x += self.linear2(torch.cat((output, F.silu(mlp)), dim=-1))
        return x


class ToyModel(nn.Module):
    patch_size, num_heads, hidden_size = 1, HEADS, WIDTH

    def __init__(self):
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.final_layer = nn.Linear(WIDTH, CHANNELS)
        self.double_blocks, self.single_blocks = nn.ModuleList([Double()]), nn.ModuleList([Single(), Single()])
        random = torch.Generator().manual_seed(3)
        for name, each in sorted(self.named_parameters()):
            scale = each.shape[-1] ** -0.5 if each.ndim > 1 else 0.1
            each.data = torch.randn(each.shape, generator=random) * scale + (1.0 if name.endswith("norm.weight") else 0)
        self.requires_grad_(False)

    def forward(self, x, timestep, context, transformer_options):
        options = dict(transformer_options)
        img, txt = self.img_in(x.flatten(2).transpose(1, 2)), self.txt_in(context)
        options["block_type"] = "double"
        for number, block in enumerate(self.double_blocks):
            options["block_index"] = number
            img, txt = block(img, txt=txt, transformer_options=options)
        joint = torch.cat((txt, img), dim=1)
        options["block_type"] = "single"
        for number, block in enumerate(self.single_blocks):
            options["block_index"] = number  # the same dictionary: what recomputes a block must not trust it
            joint = block(joint, transformer_options=options)
        return self.final_layer(joint[:, txt.shape[1] :]).transpose(1, 2).reshape(x.shape)


class ToyTrainee:
    """`linearize.training.engine.protocols.Trainee`."""

    has_negative = False

    def __init__(self, size=(5, 7), num_samples=6):
        self.host, self.module, self.num_samples = FluxHost(), ToyModel(), num_samples
        self.sites, self._size = self.host.sites(self.module), size
        self.runtime = Runtime(self.host, {}, LongLived())
        self.roles = Roles(self.module, self.runtime)
        self.switch, self.blocks, self.install = self.roles.switch, self.roles.blocks.sites, self.roles.install

    @property
    def checkpointing(self):
        return self.roles.blocks.checkpointing

    @checkpointing.setter
    def checkpointing(self, value):
        self.roles.blocks.checkpointing = value

    def parts(self, draw):
        random = torch.Generator().manual_seed(draw.sample)
        text = torch.randn(1, TEXT, CHANNELS, generator=random)
        clean = torch.randn(1, CHANNELS, *self._size, generator=random)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(draw.seed))
        return draw.percent * clean + (1 - draw.percent) * noise, clean, noise, text

    def forward(self, draw):
        noised, _, _, text = self.parts(draw)
        options = {RUNTIME_KEY: self.runtime, OVERRIDE_KEY: AttentionOverride()}

        def run():
            call = ModelCall(self.module, (noised, None, text), {})
            return self.module(noised, None, text, self.runtime.begin_call(call, options))

        return run

    def watch(self, draw, observe):
        return self.roles.watch(self.forward(draw), observe)

    def predict(self, draw, observe=None):
        return self.roles.predict(self.forward(draw), observe)

    def flow_target(self, draw):
        _, clean, noise, _ = self.parts(draw)
        return noise - clean

    def each_block(self, draw, show):
        return self.roles.each_block(self.forward(draw), show)
