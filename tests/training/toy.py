"""A small transformer as a teacher, without ComfyUI: text and a picture's tokens through three attention sites."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from linearize.attention.hosts.base import Site
from linearize.attention.hosts.flux import FluxHost
from linearize.attention.layout import Segment, TokenLayout, grid_segment
from linearize.attention.site_call import SiteCall

HEADS, SIZE, TEXT = 2, 8, 3
WIDTH = HEADS * SIZE


class ToyTeacher:
    """`linearize.training.engine.protocols.Teacher`."""

    host = FluxHost()
    has_negative = False

    def __init__(self, height=5, width=7, num_samples=6, sharpness=1.2):
        self.layout = TokenLayout.of((Segment("text", TEXT), grid_segment("main", 1, height, width)))
        self.sites = tuple(Site(name, HEADS, SIZE) for name in ("double.0", "single.0", "single.1"))
        self.num_samples, self.forwards = num_samples, 0
        random = torch.Generator().manual_seed(3)
        self.weights = [torch.randn(4, WIDTH, WIDTH, generator=random) * WIDTH**-0.5 for _ in self.sites]
        self.weights = [w * torch.tensor([sharpness, sharpness, 1, 1]).reshape(4, 1, 1) for w in self.weights]

    def watch(self, draw, observe):
        self.forwards += 1
        random = torch.Generator().manual_seed(draw.sample)
        clean = torch.randn(1, self.layout.num_tokens, WIDTH, generator=random)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(draw.seed))
        x = draw.percent * clean + (1 - draw.percent) * noise
        for site, (w_q, w_k, w_v, w_o) in zip(self.sites, self.weights, strict=True):
            q, k, v = (self.heads(F.layer_norm(x, (WIDTH,)) @ w) for w in (w_q, w_k, w_v))
            output = F.scaled_dot_product_attention(q, k, v)
            observe(SiteCall(site.id, self.layout, q, k, v, output))
            x = x + output.transpose(1, 2).reshape(x.shape) @ w_o
        return x - clean

    @staticmethod
    def heads(x):
        return x.reshape(1, -1, HEADS, SIZE).transpose(1, 2)


class Overflowing(ToyTeacher):
    """From a forward on, one tensor of the calls of single.0 holds an infinity."""

    def __init__(self, name, first):
        super().__init__()
        self.name, self.first = name, first

    def watch(self, draw, observe):
        def spoilt(call):
            if call.site == "single.0" and self.forwards > self.first:
                tensor = getattr(call, self.name).clone()
                tensor[0, 1, -1, 0] = float("inf")
                call = replace(call, **{self.name: tensor})
            observe(call)

        return super().watch(draw, spoilt)
