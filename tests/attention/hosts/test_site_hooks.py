"""What runs right now: hooks on modules tell the innermost site, block and layer, and nothing once they are gone."""

import pytest
import torch

from linearize.attention.hosts.site_hooks import (
    current_block,
    current_site,
    forget_running,
    hook_sites,
    hooks_of,
    preferred_attention,
)


class Noting(torch.nn.Module):
    """Notes what runs, before and after the modules inside it."""

    def __init__(self, notes, **inside):
        super().__init__()
        self.notes = notes
        for name, module in inside.items():
            self.add_module(name, module)

    def forward(self, x):
        self.notes.append((current_site(), current_block()))
        for module in self.children():
            module(x)
        self.notes.append((current_site(), current_block()))
        return x


def test_the_innermost_module_counts():
    notes = []
    model = Noting(notes, outer=Noting(notes, inner=Noting(notes)))
    remove = hooks_of(model, {"s.0": "outer", "s.1": "outer.inner"}, {"b.0": "outer"})()
    model(1)
    outside, outer, inner = (None, None), ("s.0", "b.0"), ("s.1", "b.0")
    assert notes == [outside, outer, inner, inner, outer, outside]
    remove()
    notes.clear()
    model(1)
    assert set(notes) == {outside}


def test_a_module_that_raises_leaves_nothing_behind():
    def stop(x):
        raise InterruptedError

    model = torch.nn.ModuleDict({"block": torch.nn.Identity()})
    model["block"].forward = stop
    hook_sites(model, {"s.0": "block"})
    with pytest.raises(InterruptedError):
        model["block"](1)
    assert current_site() is None


def test_a_forward_starts_outside_of_everything():
    model = torch.nn.ModuleDict({"block": torch.nn.Identity()})
    hooks_of(model, {"s.0": "block"}, {"b.0": "block"})()
    model["block"].register_forward_pre_hook(lambda *_: forget_running())
    model["block"].register_forward_pre_hook(lambda *_: noted.append((current_site(), current_block())))
    noted = []
    model["block"](1)
    assert noted == [(None, None)]


def test_a_layer_tells_the_attention_that_its_checkpoint_names():
    noted = []
    layer, other = torch.nn.Identity(), torch.nn.Identity()
    layer.comfy_attention = torch.nn.Identity()
    layer.comfy_attention.function = chosen = lambda *_: None
    for each in (layer, other):
        each.register_forward_hook(lambda *_: noted.append(preferred_attention()))
    hooks_of(torch.nn.ModuleList([layer, other]), {}, {})()
    # the hooks above were there first, so these are asked inside
    layer(1), other(1)
    assert noted == [chosen, None] and preferred_attention() is None


@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_what_is_compiled_stays_so_when_it_is_hooked_again(whole):
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Softplus(), torch.nn.Softplus())
    for module in [model] if whole else model:
        module.compile(backend="eager")
    hooks = hooks_of(model, {}, {"b.0": "0", "b.1": "1"})

    def run():
        remove = hooks()
        model(torch.ones(2))
        remove()

    run()
    with torch.compiler.set_stance("fail_on_recompile"):
        run()
    torch._dynamo.reset()
