"""A model that is built like a host and calls its attention past it is refused; whatever may work is not."""

import copy
import functools
import importlib
import importlib.util
import linecache
import time
import types

import pytest
import torch
from families import collect, default_operations
from test_contract import Passing, opaque

from linearize.attention.hosts import HOSTS, class_code, find_host, unhookable
from linearize.attention.hosts.entry_points import hides_its_calls, may_be_called, why_unseen

FAMILIES = collect()
SIZES = {"dim": 64, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "num_heads": 2, "num_layers": 2}
WAN = next(host for host in HOSTS if host.name == "wan")


def wan(block=None, model=None):
    """A Wan of the given classes; `block` and `model` take the class of ComfyUI and return one built on it."""
    core = importlib.import_module("comfy.ldm.wan.model")
    cls = core.WanModel if model is None else model(core.WanModel)
    made = cls(**SIZES, **default_operations())
    if block is not None:
        other = block(core.WanAttentionBlock, core.WanSelfAttention)
        for each in made.blocks:
            each.__class__ = other
            each.self_attn.__class__ = other.attention
    return made


def another_method_of_the_attention(base, attention):
    class Attention(attention):
        def forward_generation(self, x, freqs, transformer_options=None):
            return super().forward(x, freqs, transformer_options=transformer_options)

    class Block(base):
        def forward(self, x, e, freqs, context, context_img_len=257, transformer_options=None):
            return x + self.self_attn.forward_generation(self.norm1(x), freqs, transformer_options)

    Block.attention = Attention
    return Block


def attention_of_torch(base, attention):
    class Attention(attention):
        def forward(self, x, freqs, transformer_options=None):
            query, key, value = (each(x).unflatten(2, (self.num_heads, -1)) for each in (self.q, self.k, self.v))
            found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            return self.o(found.flatten(2))

    return type("Block", (base,), {"attention": Attention})


def attention_without_options(base, attention):
    from comfy.ldm.modules.attention import optimized_attention

    class Attention(attention):
        def forward(self, x, freqs, transformer_options=None):
            x = self.attend(self.q(x), self.k(x), self.v(x))
            return self.o(x)

        def attend(self, query, key, value):
            return optimized_attention(query, key, value, heads=self.num_heads)

    return type("Block", (base,), {"attention": Attention})


def method_of_the_block(base, attention):
    class Block(base):
        def forward_tile(self, x, freqs):
            return x + self.self_attn.project(x, freqs)

    Block.attention = attention
    return Block


def looped(base):
    class Model(base):
        def forward_orig(self, x, t, context, freqs=None, **kwargs):
            for i, block in enumerate(self.blocks):

                def wrapped(args, block=block):
                    return block.forward_tile(args, freqs)

                x = wrapped(x) if i else self.blocks[i].forward_tile(x, freqs)
            return x

    return Model


REFUSED = {
    "another method": ((another_method_of_the_attention, None), "its blocks use methods of self_attn that Linearize"),
    "another method of the block": ((method_of_the_block, looped), "its blocks use methods of self_attn that"),
    "attention of torch": ((attention_of_torch, None), "its attention hides its calls from other code"),
    "no options": ((attention_without_options, None), "its attention hides its calls from other code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_cannot_be_seen_is_refused_in_one_sentence(name, comfy):
    (block, model), reason = REFUSED[name]
    built = wan(block, model)
    with pytest.raises(ValueError, match=rf"^Linearize cannot work on this model \(.*, built like Wan\): {reason}"):
        find_host(built)


def test_the_models_listed_for_it_are_found_without_the_list(monkeypatch, comfy):
    core = pytest.importorskip("comfy.ldm.wan.model_animate2", reason="newer than this ComfyUI")
    monkeypatch.setattr(unhookable, "UNHOOKABLE", ())
    with pytest.raises(ValueError, match="its blocks use methods of self_attn that Linearize does not know"):
        find_host(core.WanAnimate2Model(**SIZES, **default_operations()))


def chosen(base, attention):
    class Block(base):
        def forward(self, x, e, freqs, context, context_img_len=257, transformer_options=None, attention=None):
            attention = self.self_attn if attention is None else attention
            return x + attention(self.norm1(x), freqs, transformer_options=transformer_options)

    Block.attention = attention
    return Block


def checkpointed(base, attention):
    class Block(base):
        def forward(self, x, e, freqs, context, context_img_len=257, transformer_options=None):
            return x + torch.utils.checkpoint.checkpoint(self.self_attn, self.norm1(x), freqs)

    Block.attention = attention
    return Block


def both_ways(base, attention):
    class Block(base):
        def forward(self, x, e, freqs, context, context_img_len=257, transformer_options=None, cache=None):
            if cache is not None:
                return self.self_attn.forward_cached(x, cache)
            return super().forward(x, e, freqs, context, context_img_len, transformer_options)

    Block.attention = attention
    return Block


def calls_itself(base, attention):
    class Block(base):
        def forward_tile(self, x, freqs):
            return self(x, None, freqs, None)

    Block.attention = attention
    return Block


def calls_its_forward(base, attention):
    class Block(base):
        def forward_tile(self, x, freqs):
            return super().forward(x, None, freqs, None)

    Block.attention = attention
    return Block


def attention_that_calls_itself(base, attention):
    class Attention(attention):
        def forward_generation(self, x, freqs, transformer_options=None):
            return self(x, freqs, transformer_options=transformer_options)

    block = another_method_of_the_attention(base, attention)
    return type("Block", (block,), {"attention": Attention})


def children(base):
    class Model(base):
        def forward_orig(self, x, t, context, freqs=None, **kwargs):
            for block in self.blocks.children():
                x = block(x)
            return x

    return Model


def handed_on(base):
    class Model(base):
        def forward_orig(self, x, t, context, freqs=None, **kwargs):
            return functools.reduce(lambda x, block: block(x), self.blocks, x)

    return Model


def without_source(base, attention):
    block = another_method_of_the_attention(base, attention)
    block.forward.__code__ = block.forward.__code__.replace(co_filename="gone", co_firstlineno=9999)
    return block


MAY_WORK = {
    "chosen": (chosen, None),
    "checkpointed": (checkpointed, None),
    "both ways": (both_ways, None),
    "calls itself": (calls_itself, looped),
    "calls its forward": (calls_its_forward, looped),
    "attention that calls itself": (attention_that_calls_itself, None),
    "children": (None, children),
    "handed on": (None, handed_on),
    "without source": (without_source, None),
    "as it is": (None, None),
}


@pytest.mark.parametrize("name", MAY_WORK)
def test_whatever_may_be_called_is_accepted(name, comfy):
    assert find_host(wan(*MAY_WORK[name])).name == "wan"


def test_functions_that_another_pack_put_on_instances_are_its_own(comfy):
    for place in ("", "blocks.0", "blocks.0.self_attn"):
        model = wan(another_method_of_the_attention)
        part = model.get_submodule(place)
        part.forward = types.MethodType(lambda self, x: x, part)
        assert place == "" or find_host(model).name == "wan", place


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES])
def test_every_family_is_accepted_wrapped_and_packed_too(family, tiny):
    host = next(host for host in HOSTS if host.name == family.host)
    model = tiny(family)
    for each in (model, Passing(model), opaque(model), torch.compile(model)):
        assert why_unseen(host, each) is None


def test_answers_are_certain_or_there_are_none(comfy):
    model = wan(another_method_of_the_attention)
    assert not may_be_called(model, "blocks.0.self_attn")
    assert may_be_called(model, "blocks.0.cross_attn.q") and may_be_called(model, "blocks.0.nothing")
    assert not hides_its_calls(model, "blocks.0.self_attn") and not hides_its_calls(model, "blocks.0.nothing")


@pytest.mark.parametrize("first", ["def renamed(self, x):\n        return x", "x = 1", "x = ('''", "x = ((", "  ]"])
def test_code_that_changed_after_its_import_is_not_read(first, tmp_path):
    """ComfyUI may be updated while it runs; what stands in its files then is not what runs."""
    path = tmp_path / "model.py"
    path.write_text("class Model:\n    def forward(self, x):\n        return self.inner(x)\n")
    spec = importlib.util.spec_from_file_location("model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = module.Model.forward.__code__
    class_code.tree_of.cache_clear()  # equal code of another file is the same to it
    assert class_code.tree_of(code) is not None
    class_code.tree_of.cache_clear()
    path.write_text(f"class Model:\n    {first}\n")
    linecache.checkcache(str(path))
    assert class_code.tree_of(code) is None


def test_it_takes_milliseconds(comfy):
    model = wan()
    model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(38))
    find_host(model)
    began = time.perf_counter()
    find_host(model)
    assert time.perf_counter() - began < 0.05
