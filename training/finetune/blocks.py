"""Transformer blocks as the trainer sees them: found by structure, checkpointed, shown one by one.

Models compute in place where they can. Here every block runs so that what a backward pass needs survives that, and so
that running it a second time repeats the first.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Shown = Callable[[str, "Arguments", tuple[Tensor, ...]], None]
_inside: ContextVar[bool] = ContextVar("a block is run by this module", default=False)
HARMLESS = {"requires_grad_", "detach_", "retain_grad_", "share_memory_"}


def find_blocks(module: nn.Module, weights: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Return the sites of each transformer block, by its path: the shortest one ending in a number that holds them.

    Args:
        module: the diffusion model.
        weights: by site, the paths of its projections, see `Host.site_weights`. A site in no such block is left out.
    """
    found: dict[str, tuple[str, ...]] = {}
    for site, paths in weights.items():
        block = _block(module, [path.split(".") for path in paths])
        if block:
            found[block] = (*found.get(block, ()), site)
    return found


def _block(module: nn.Module, paths: list[list[str]]) -> str:
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    common = [parts[0] for parts in alike]
    for length in range(1, len(common) + 1):
        path = ".".join(common[:length])
        if common[length - 1].isdigit() and not isinstance(module.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
            return path
    return ""


class Arguments:
    """What a block was given, kept as it was: dictionaries are copied, and with `own` tensors too.

    Callers change the transformer options from block to block, and blocks write into their inputs.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, own: bool = False) -> None:
        self._args, self._kwargs = _kept(args, own), _kept(dict(kwargs), own)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The floating point tensors among them, in order."""
        return tuple(_tensors((*self._args, *self._kwargs.values())))

    def run(self, block: nn.Module) -> Any:
        """Return what a block makes of copies of them."""
        token = _inside.set(True)
        try:
            with KeepSaved():
                # through the call, not the forward: hooks on a block tell its site
                return block(*_kept(self._args, True), **_kept(self._kwargs, True))
        finally:
            _inside.reset(token)


def _kept(value: Any, own: bool, depth: int = 0) -> Any:
    """Return a copy as far as a block may change it: of containers, and with `own` of the tensors in lists of them."""
    if _is_number(value):
        return value.clone() if own else value
    if type(value) in (list, tuple):
        return type(value)(_kept(each, own, depth) for each in value)
    if type(value) is dict:
        # what lies deeper are the transformer options, whose tensors belong to others
        return {name: _kept(each, own, 1) if depth == 0 else each for name, each in value.items()}
    return value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if _is_number(value):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class KeepSaved(TorchFunctionMode):
    """Gives a tensor that is changed in place memory of its own, so that what was saved of it keeps its values.

    It needs saved tensors to be aliases, as saved-tensor hooks make them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in HARMLESS)
        if changes and args and _is_number(args[0]) and torch.is_grad_enabled():
            _move(args[0])
            # x.addcmul_(x, y) saves x as it was
            args = (args[0], *(each.clone() if each is args[0] else each for each in args[1:]))
        return func(*args, **(kwargs or {}))


def _move(tensor: Tensor) -> None:
    base = tensor._base
    if base is None:
        tensor.data = tensor.data.clone()
        return
    copy, offset = base.data.clone(), tensor.storage_offset() - base.storage_offset()
    if copy.stride() != base.stride():  # of a base with gaps, a view cannot be found again
        return
    shape, stride = tensor.shape, tensor.stride()
    base.data = copy
    tensor.data = copy.as_strided(shape, stride, copy.storage_offset() + offset)


class Blocks:
    """The blocks of a model while it is trained.

    Args:
        module: the diffusion model; its blocks' `forward` is replaced until `remove`.
        sites: by path of a block, its sites.

    `checkpointing` keeps only what goes into a block and runs it again in the backward pass. `shown` is shown every
    block's arguments, copies of them, and what it returned.
    """

    def __init__(self, module: nn.Module, sites: Mapping[str, tuple[str, ...]]) -> None:
        self.sites = dict(sites)
        self.checkpointing = False
        self.shown: Shown | None = None
        self._module = module
        self._own: dict[str, Any] = {}
        for path in self.sites:
            block = module.get_submodule(path)
            self._own[path] = block.__dict__.get("forward")
            block.forward = self._forward(path, block, block.forward)

    def run(self, path: str, arguments: Arguments) -> tuple[Tensor, ...]:
        """Return what a block makes of its arguments, with gradients where they are enabled."""
        with torch.autograd.graph.saved_tensors_hooks(_alias, _same):
            return tensors_of(arguments.run(self._module.get_submodule(path)))

    def remove(self) -> None:
        """Give the blocks their own `forward` back."""
        for path, own in self._own.items():
            block = self._module.get_submodule(path)
            if own is None:
                del block.forward
            else:
                block.forward = own

    def _forward(self, path: str, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if _inside.get() or not (self.shown or torch.is_grad_enabled()):
                return original(*args, **kwargs)
            if self.shown:
                arguments = Arguments(args, kwargs, own=True)
                outputs = original(*args, **kwargs)
                self.shown(path, arguments, tensors_of(outputs))
                return outputs
            arguments = Arguments(args, kwargs)
            if self.checkpointing:
                return torch.utils.checkpoint.checkpoint(
                    arguments.run, block, use_reentrant=False, preserve_rng_state=False
                )
            with torch.autograd.graph.saved_tensors_hooks(_alias, _same):
                return arguments.run(block)

        return forward


def tensors_of(outputs: Any) -> tuple[Tensor, ...]:
    """Return the floating point tensors among what a block returned."""
    return tuple(_tensors((outputs,)))


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor
