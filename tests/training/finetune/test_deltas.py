"""Changes of weights: what they add, when, and that ComfyUI's LoRA keys hold the same."""

import pytest
import torch
from torch import nn

from linearize.attention.plans import Plan
from linearize.attention.specs import ClearSpec
from linearize.attention.students.file import StudentFile
from linearize.training.engine.protocols import Switch
from linearize.training.engine.schedule import generator
from linearize.training.finetune.deltas import (
    FullRank,
    LowRank,
    as_deltas,
    attach,
    made_whole,
    new_deltas,
    projections,
    read_deltas,
)

PATH = "double_blocks.0.img_attn.qkv"


def filled(kind, rows=6, columns=4, rank=2):
    """Return a change that is not 0."""
    delta = LowRank(rows, columns, rank, generator("down")) if kind == "lora" else FullRank(rows, columns)
    with torch.no_grad():
        (delta.up if kind == "lora" else delta.weight).normal_(generator=generator("up"))
    return delta


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 6), "norm": nn.LayerNorm(4), "names": nn.Embedding(3, 4)})
        self.mlp = nn.Linear(4, 4)


def test_projections_are_layers_with_a_matrix_below_the_paths():
    holder = Holder()
    assert projections(holder, ["attn"]) == {"attn.qkv": (6, 4)}
    assert projections(holder, ["attn.qkv", "attn.norm", "mlp"]) == {"attn.qkv": (6, 4), "mlp": (4, 4)}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_new_change_is_none_and_learns(kind):
    delta = new_deltas({"a": (6, 4)}, kind, 2, 0)["a"]
    x = torch.randn(3, 4, generator=generator("x"))
    assert not delta(x).any()
    (delta(x) * torch.randn(3, 6, generator=generator("w"))).sum().backward()
    assert (delta.up if kind == "lora" else delta.weight).grad.abs().sum() > 0
    again = new_deltas({"a": (6, 4), "b": (6, 4)}, kind, 2, 0)
    if kind == "lora":
        assert torch.equal(again["a"].down, delta.down) and not torch.equal(again["b"].down, delta.down)
    assert new_deltas({"a": (6, 4)}, "maps", 2, 0) == {}


def test_a_rank_above_the_sides_is_cut():
    assert LowRank(6, 4, 64, generator(0)).down.shape == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_hooks_add_what_merging_adds(kind, dtype, relative_error, tolerance):
    holder, delta, switch = Holder().to(dtype), filled(kind), Switch()
    x = torch.randn(2, 5, 4, generator=generator("x")).to(dtype)
    plain = holder.attn["qkv"](x)
    remove = attach(holder, {"attn.qkv": delta}, switch)
    assert torch.equal(holder.attn["qkv"](x), plain), "the teacher"
    switch.is_student = True
    attached = holder.attn["qkv"](input=x)
    assert attached.dtype == dtype
    layer = holder.attn["qkv"]
    merged = nn.functional.linear(x.float(), layer.weight.float() + delta.whole(), layer.bias.float())
    assert relative_error(attached, merged) < tolerance[dtype]
    remove()
    assert torch.equal(holder.attn["qkv"](x), plain)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_keys_hold_the_same_change_and_a_student_takes_them(kind):
    delta = filled(kind)
    tensors = as_deltas({PATH: delta})
    endings = {"lora": ["lora_up.weight", "lora_down.weight", "alpha"], "full": ["diff"]}[kind]
    assert list(tensors) == [f"diffusion_model.{PATH}.{ending}" for ending in endings]
    assert all(each.dtype == torch.float32 and not each.requires_grad for each in tensors.values())
    StudentFile("flux", Plan("flux", ClearSpec()), deltas=tensors)
    read = read_deltas(tensors)[PATH]
    assert type(read) is type(delta) and torch.equal(read.whole(), delta.whole())
    whole = made_whole(read)
    assert torch.equal(whole.whole(), delta.whole())


def test_other_names_of_loras_and_their_alpha_are_read():
    up, down = torch.randn(6, 2, generator=generator(1)), torch.randn(2, 4, generator=generator(2))
    name = f"diffusion_model.{PATH}"
    read = read_deltas({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down, f"{name}.alpha": torch.tensor(8.0)})
    assert torch.allclose(read[PATH].whole(), up @ down * 4)
    assert torch.allclose(read_deltas(as_deltas(read))[PATH].whole(), up @ down * 4)


@pytest.mark.parametrize("ending, shape", [("diff_b", (6,)), ("set_weight", (6, 4)), ("diff", (6, 4, 1, 1))])
def test_changes_that_cannot_be_trained_further_are_named(ending, shape):
    with pytest.raises(ValueError, match=f"{ending}, and only differences of matrices"):
        read_deltas({f"diffusion_model.{PATH}.{ending}": torch.zeros(shape)})
