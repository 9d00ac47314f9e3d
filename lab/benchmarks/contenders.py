"""The functions that are timed: what users would pick instead, and ours.

A contender is made for one shape, and, if it is not dense, for one spec. It returns a function of no arguments, or a
sentence that says why it does not run here.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearize.attention import ClearSpec, attention
from linearize.attention.hosts.base import Site
from linearize.attention.memory import LongLived
from linearize.attention.site_call import SiteCall
from linearize.attention.specs import Spec
from linearize.attention.students.learned import new_maps
from linearize.training.engine.recipe import TransferRecipe
from linearize.training.transfer.site_trainer import SiteTrainer

from .registry import Shape, Suite

FLEX_BLOCK = 128
FLEX_TILE = (8, 16)  # rows and columns of the tokens of one block, in tile order


@dataclass(frozen=True, slots=True)
class Case:
    """One shape with its tensors.

    Args:
        query, key, value: (B, H, N, D), text first. grad: of the output, None where only forward is timed.
    """

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def timed(self, function: Callable[..., Tensor], learned: Iterable[Tensor] = ()) -> Callable[[], object]:
        """Return what is timed: the function on the inputs; with a `grad`, gradients of them and of `learned` too.

        Without a `grad` nothing is recorded for gradients, as when ComfyUI samples.
        """
        if self.grad is None:
            return torch.no_grad()(lambda: function(*self.inputs))
        leaves = (*self.inputs, *learned)
        return lambda: torch.autograd.grad(function(*self.inputs), leaves, self.grad)


Made = Callable[[], object] | str


def make_case(shape: Shape, device: str, backward: bool = False) -> Case:
    """Return a shape's case with random inputs."""
    query, key, value = shape.inputs(device, requires_grad=backward)
    return Case(shape, query, key, value, torch.randn_like(query).detach() if backward else None)


def dense(case: Case, backend: SDPBackend | None = None) -> Made:
    """PyTorch's dense attention: what it picks itself, or one of its backends."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return case.timed(run)


def sage(case: Case) -> Made:
    """SageAttention: dense, quantised, not exact."""
    if importlib.util.find_spec("sageattention") is None:
        return "sageattention is not installed"
    if case.grad is not None:
        return "sageattention has no gradients"
    from sageattention import sageattn

    return case.timed(partial(sageattn, tensor_layout="HND"))


def ours(case: Case, spec: Spec, backend: str) -> Made:
    """One of the pack's backends; feature maps are made once, as those of a student."""
    layout, memory = case.shape.layout, LongLived()
    if not spec.has_maps:
        return case.timed(lambda q, k, v: attention(q, k, v, layout, spec, backend=backend, memory=memory))
    maps = new_maps(spec, case.shape.heads, case.shape.head_dim)
    learned = [number for each in maps for number in each.to(case.query.device).parameters()]
    return case.timed(lambda q, k, v: attention(q, k, v, layout, spec, maps=maps, backend=backend), learned)


def flex(case: Case, spec: ClearSpec, in_tiles: bool, compiled: bool = True) -> Made:
    """Compiled FlexAttention: in raster order, which is CLEAR's own way, or with the picture's tokens in tile order.

    In tile order the inputs count as permuted already, so that only the kernels differ.
    """
    if spec.down_factor > 1:
        return "pooled keys are not written for FlexAttention here"
    rows, columns = case.shape.grid
    if in_tiles and (rows % FLEX_TILE[0] or columns % FLEX_TILE[1]):
        return f"tiles of {FLEX_TILE[0]} x {FLEX_TILE[1]} tokens do not divide {rows} x {columns}"
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, device = case.query.shape[2], case.query.device
    build = torch.compile(create_block_mask) if compiled else create_block_mask
    mask = build(clear_mask(case.shape, spec.radius, in_tiles), None, None, tokens, tokens, device, FLEX_BLOCK)
    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return case.timed(lambda q, k, v: run(q, k, v, block_mask=mask))


def clear_mask(shape: Shape, radius: int, in_tiles: bool) -> Callable[..., Tensor]:
    """Return CLEAR's mask as a function of batch, head, query and key index, for FlexAttention."""
    text, columns = shape.text, shape.grid[1]
    tile_rows, tile_columns = FLEX_TILE
    across = columns // tile_columns

    def place(index: Tensor) -> tuple[Tensor, Tensor]:
        if not in_tiles:
            return index // columns, index % columns
        tile, within = index // (tile_rows * tile_columns), index % (tile_rows * tile_columns)
        return tile // across * tile_rows + within // tile_columns, tile % across * tile_columns + within % tile_columns

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (query_row, query_column), (key_row, key_column) = place(query - text), place(key - text)
        near = (query_row - key_row) ** 2 + (query_column - key_column) ** 2 < radius**2
        return (query < text) | (key < text) | near

    return visible


def natten(case: Case, spec: ClearSpec) -> Made:
    """NATTEN: a square window of the disc's width, and the text. An easier mask than ours, and more pairs."""
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    if spec.down_factor > 1:
        return "natten has no pooled keys"
    from natten import na2d

    text, (rows, columns) = case.shape.text, case.shape.grid
    window = 2 * spec.radius - 1
    if window > min(rows, columns):
        return f"a window of {window} is larger than {rows} x {columns}"

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pictures = (tensor[:, :, text:].transpose(1, 2).unflatten(1, (rows, columns)) for tensor in (query, key, value))
        texts = (tensor[:, :, :text].transpose(1, 2) for tensor in (key, value))
        extra = dict(zip(("additional_keys", "additional_values"), texts, strict=True))
        picture = na2d(*pictures, kernel_size=(window, window), **extra).flatten(1, 2).transpose(1, 2)
        return torch.cat((F.scaled_dot_product_attention(query[:, :, :text], key, value), picture), dim=2)

    return case.timed(run)


def ablation(case: Case, spec: ClearSpec, change: str) -> Made:
    """Our kernel on a changed table: wrong results, to see what a part of it costs."""
    from linearize.attention.gpu.clear_blocks import query_table
    from linearize.kernels import architecture, attend, tile_for
    from linearize.kernels.clear_table import ABSOLUTE

    device, heads = case.query.device, case.shape.heads
    tile = tile_for("forward", architecture(device), case.shape.head_dim)
    table = query_table(case.shape.layout, [(spec.radius, spec.temporal_radius)] * heads, (), tile, device)
    blocks, columns = table.blocks.clone(), table.columns.clone()
    columns[columns >= ABSOLUTE] = 0  # as a full step would read it
    if change == "no gather":
        run = min(128, case.query.shape[2] - int(blocks[:, 0].max()))  # tokens in a row that every block has
        for first, num_full, num_masked in blocks[:, 5:8].unique(dim=0).tolist():
            steps = (num_full + num_masked) * tile.columns
            columns[first : first + steps] = torch.arange(steps, device=device, dtype=torch.int32) % run
    blocks[:, 6] += blocks[:, 7]  # masked steps count as full ones
    blocks[:, 7] = 0
    changed = table._replace(blocks=blocks, columns=columns)
    return case.timed(lambda q, k, v: attend(q, k, v, (changed,), q.shape[-1] ** -0.5))


def update(case: Case, spec: Spec, queries: int) -> Made:
    """One update of Distill Attention at one site, on some queries: output, loss, gradients, step of the optimiser.

    The teacher's forward, of which every update has one for all sites, is not in it.
    """
    facts = Site("double.0", case.shape.heads, case.shape.head_dim)
    trainer = SiteTrainer(facts, spec, TransferRecipe(updates=1), case.query.device)
    call = SiteCall("double.0", case.shape.layout, *case.inputs, dense(case)())
    rows = torch.arange(case.shape.text, case.shape.layout.num_tokens, device=case.query.device)
    rows = rows[torch.randperm(len(rows))[:queries].to(rows.device)]

    def run() -> None:
        trainer.backward(call, rows)
        trainer.step(1.0)

    return run


DENSE: dict[str, Callable[[Case], Made]] = {
    "dense": dense,
    "dense cudnn": partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    "dense flash": partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    "sage": sage,
}
RUNNERS: dict[str, Callable[..., Made]] = {  # of a case and a spec
    "triton": partial(ours, backend="triton"),
    "torch": partial(ours, backend="torch"),
    "clear": partial(ours, backend="torch"),  # as stored rows call it for windows
    "flex raster": partial(flex, in_tiles=False),
    "flex tiles": partial(flex, in_tiles=True),
    "natten": natten,
    "update 256": partial(update, queries=256),
    "update all": partial(update, queries=2**31),
    "no masks": partial(ablation, change="no masks"),
    "no gather": partial(ablation, change="no gather"),
}


def runnable(suite: Suite, shape: Shape, device: str, only: str = "") -> dict[str, Callable[[], object]]:
    """Return name: function for what runs here, or for `only` one contender; say what does not run."""
    case = make_case(shape, device, suite.backward)
    found = {}
    for name, (runner, spec) in suite.contenders.items():
        if only in ("", name):
            made = DENSE[runner](case) if runner in DENSE else RUNNERS[runner](case, spec)
            if reason := made if isinstance(made, str) else why_not(made):
                print(f"{shape.pixels} {name}: not run: {reason}", file=sys.stderr, flush=True)
            else:
                found[name] = made
    return found


def why_not(function: Callable[[], object]) -> str:
    """Run a contender once, which compiles it; return why it cannot run, or nothing."""
    try:
        function()
    except Exception as error:  # another library may throw anything; the others are still timed
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
    return ""
