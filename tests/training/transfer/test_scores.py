"""The score loss subtracts what attention subtracts: maps for which it is 0 make attention exact, and no others."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from linearize.attention import Segment, TokenLayout, grid_segment
from linearize.attention.kinds.kind import Learned
from linearize.attention.kinds.mapped import mapped_attention
from linearize.attention.kinds.reference import exact_and_linear_masks
from linearize.attention.site_call import SiteCall
from linearize.attention.specs import STABILIZERS, ChunkedSpec, HybridSpec, LinearSpec
from linearize.attention.students.learned import new_maps
from linearize.training.engine.losses import score_loss
from linearize.training.transfer.scores import scores_and_products

LAYOUTS = {
    "picture": TokenLayout((Segment("text", 3), grid_segment("main", 1, 5, 3))),
    "clip": TokenLayout((grid_segment("main", 5, 1, 3), Segment("text", 2))),
    "two grids": TokenLayout((Segment("text", 1), grid_segment("main", 3, 1, 3), grid_segment("reference", 1, 2, 2))),
    "no text": TokenLayout((grid_segment("main", 3, 1, 5),)),
}
SPECS = {
    "linear": LinearSpec(),
    **{f"hybrid {each}": HybridSpec(3, stabilizer=each) for each in STABILIZERS},
    "chunked": ChunkedSpec(2, 1),
    "chunked causal": ChunkedSpec(2, 1, causal=True),
    "chunked wide overlap": ChunkedSpec(1, 2),
}


class Ideal(nn.Module):
    """A map that knows its tokens by heart: the logs of its features are rows of a table."""

    def __init__(self, tokens, logs, is_exponential=False):
        super().__init__()
        self.tokens, self.table, self.is_exponential = tokens, logs, is_exponential
        self.num_features = logs.shape[-1]

    def logs(self, x, root):
        place = (x[:, :, :, None] == self.tokens[:, :, None]).all(-1).float().argmax(-1)
        return self.table.gather(2, place[..., None].expand(*place.shape, self.num_features))

    def forward(self, x):
        return self.logs(x, 1.0).exp()


def ideal_call(layout, spec, is_exponential=False, scale=0.4, common=0.0):
    """Return a call, attention over all that its queries see, and maps with which `spec` has to be just that."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((2, 2, layout.num_tokens, 4), generator=generator) * 1.7 + common for _ in range(3)
    )
    exact, linear = exact_and_linear_masks(layout, spec)
    scores = query @ key.transpose(-1, -2) * scale
    shift = torch.zeros(())
    if exact.any(-1).all() and not is_exponential:
        seen = scores.masked_fill(~exact, float("-inf"))
        stabilizer = spec.stabilizer
        shift = {"max": seen.amax(-1, keepdim=True), "lse": seen.logsumexp(-1, keepdim=True)}.get(stabilizer, shift)
    elif not is_exponential:
        shift = scores.amax(-1, keepdim=True)
    names = (torch.eye(layout.num_tokens) - 1).mul(1e4).expand_as(scores)
    maps = (Ideal(query, scores - shift, is_exponential), Ideal(key, names, is_exponential))
    dense = scores.masked_fill(~(exact | linear), float("-inf")).softmax(-1) @ value
    return SiteCall("single.0", layout, query, key, value, dense, scale=scale), maps


@pytest.mark.parametrize("is_exponential", [False, True], ids=["learned", "exponential"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_loss_is_0_where_the_attention_is_exact(layout, spec, is_exponential, relative_error):
    call, maps = ideal_call(layout, spec, is_exponential)
    output = mapped_attention(call.query, call.key, call.value, layout, spec, maps, scale=call.scale)
    assert relative_error(output, call.output) < 1e-5
    rows = torch.cat([torch.arange(s, s + t * h * w) for s, (t, h, w) in layout.grids])[1::2]
    scores, products = scores_and_products(call, spec, Learned(maps=maps), rows)
    assert score_loss(scores, products) < 1e-6
    linear = exact_and_linear_masks(layout, spec)[1][rows]
    assert torch.equal(scores.isfinite(), linear.expand_as(scores)) and not products[:, :, ~linear].any()
    if linear.any():
        maps[0].table += 0.5
        assert score_loss(*scores_and_products(call, spec, Learned(maps=maps), rows)) > 0.01


def test_without_a_scale_it_is_that_of_the_heads():
    layout, spec = LAYOUTS["no text"], LinearSpec("favor")
    call, rows = replace(ideal_call(layout, spec)[0], scale=None), torch.arange(0, 15, 2)
    maps = new_maps(spec, 2, 4)
    relative, products = scores_and_products(call, spec, Learned(maps=maps), rows)
    query = call.query[:, :, rows]
    scores = query @ call.key.transpose(-1, -2) / 2
    expected = (maps[0](query) @ maps[1](call.key).transpose(-1, -2)).log() - scores
    assert torch.allclose(products.log() - relative, expected, atol=1e-4)


def test_scores_beyond_the_range_of_exponents_have_a_finite_loss_and_gradient():
    layout, spec = LAYOUTS["picture"], HybridSpec(2, "polynomial", stabilizer="common")
    call, maps = ideal_call(layout, spec, common=16.0)
    assert call.query.matmul(call.key.transpose(-1, -2)).mul(0.4).amin() > 200
    table = maps[0].table.requires_grad_()
    for offset in (0.0, 90.0, -20.0):
        maps[0].table = table + offset
        loss = score_loss(*scores_and_products(call, spec, Learned(maps=maps), torch.arange(3, 18)))
        (gradient,) = torch.autograd.grad(loss, table)
        assert loss.isfinite() and gradient.isfinite().all()
        assert loss < 1e-6 if offset == 0 else gradient.sum() * offset > 0, "downhill is towards the scores"
