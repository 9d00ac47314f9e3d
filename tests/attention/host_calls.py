"""A host made for tests, attention under its contract, and calls of the override as it makes them."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from linearize.attention import ClearSpec, Segment, TokenLayout, grid_segment
from linearize.attention.hosts import Site
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import AttentionOverride
from linearize.attention.runtime.runtime import CALL_KEY, RUNTIME_KEY, ForwardFacts, Runtime, SiteSettings

LAYOUT = TokenLayout.of((Segment("text", 3), grid_segment("main", 1, 5, 6)))
HEADS, HEAD_DIM, TOKENS = 2, 8, LAYOUT.num_tokens
HOST = SimpleNamespace(
    name="test",
    title="Test",
    site_of=lambda options: options.get("site"),
    site_among=lambda site, layout, num_tokens: site,
    site_layout=lambda site, layout: layout,
    layout=lambda call: LAYOUT,
    sites=lambda module: (Site("a", HEADS, HEAD_DIM),),
    site_modules=lambda module: {},
    site_blocks=lambda module: {},
)


def runtime(spec=None, **settings):
    return Runtime(HOST, {"a": SiteSettings(spec or ClearSpec(2), **settings)}, LongLived())


def qkv(dtype=torch.float32, batch=2):
    torch.manual_seed(0)
    return tuple(torch.randn(batch, HEADS, TOKENS, HEAD_DIM, dtype=dtype) for _ in range(3))


def host_attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, scale=None, **kwargs):
    """Attention under the host application's contract, by PyTorch's own function."""
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (t.reshape(t.shape[0], t.shape[1], -1, head_dim).transpose(1, 2) for t in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def call(state, q, k, v, *args, override=None, layout=LAYOUT, site="a", **kwargs):
    options = {"site": site, RUNTIME_KEY: state, CALL_KEY: ForwardFacts(layout)}
    return (override or AttentionOverride())(
        host_attention, q, k, v, HEADS, *args, transformer_options=options, **kwargs
    )


def flat(tensor):
    return tensor.transpose(1, 2).flatten(2)
