"""Forward hooks that know which site, block and layer of a model is running.

Some architectures tell their sites by module only. The others name the block in the transformer options, which is wrong
where another node runs several blocks inside one; their blocks are hooked too, and the hook wins. What runs is kept per
thread, so that model calls in parallel threads do not see each other's.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

PREFERRED = "comfy_attention"  # the module that names a layer's own attention, in ComfyUI's 0.35 and later

Running = ContextVar[tuple[Any, ...]]
_sites: Running = ContextVar("sites whose module runs", default=())
_blocks: Running = ContextVar("sites whose block runs", default=())
_layers: Running = ContextVar("layers that run and have an attention of their own", default=())


def current_site() -> str | None:
    """Return the site whose module is running in this thread, or None outside of all of them."""
    return _last(_sites)


def current_block() -> str | None:
    """Return the site of the block that is running in this thread, or None outside of all of them."""
    return _last(_blocks)


def preferred_attention() -> Callable[..., Any] | None:
    """Return the attention that the checkpoint names for the layer that is running, or None."""
    return getattr(getattr(_last(_layers), PREFERRED, None), "function", None)


def forget_running() -> None:
    """Start a forward outside of everything: an interrupt leaves modules without running their hooks."""
    for running in (_sites, _blocks, _layers):
        running.set(())


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A diffusion model as its loader made it: other nodes may run its blocks inside one of their own later.

    Args:
        site: its first site, whose sizes stand for all.
        hook: hooks its modules; returns a function that takes the hooks away.
    """

    site: Any
    hook: Callable[[], Callable[[], None]]

    @classmethod
    def of(cls, host: Any, module: Any) -> "KnownModel":
        """Return what is known of a model of this host."""
        return cls(host.sites(module)[0], hooks_of(module, host.site_modules(module), host.site_blocks(module)))


def hooks_of(module: Any, sites: Mapping[str, str], blocks: Mapping[str, str]) -> Callable[[], Callable[[], None]]:
    """Return a function that hooks a model's modules, as they are now, and returns one that takes the hooks away.

    Args:
        module: the model, before another node runs its blocks inside one of its own.
        sites: by site, the dotted path of the module that issues its attention call and no other.
        blocks: by site, the dotted path of its block.
    """
    hooks = [(_sites, site, module.get_submodule(path)) for site, path in sites.items()]
    hooks += [(_blocks, site, module.get_submodule(path)) for site, path in blocks.items()]
    hooks += [(_layers, None, layer) for layer in _layers_of(module)]
    return lambda: hook(hooks)


def hook(hooks: Iterable[tuple[Running, str | None, Any]]) -> Callable[[], None]:
    """Have modules note a value, or themselves for None, while they run; return what takes the hooks away."""
    handles = []
    for running, value, module in hooks:
        enter, leave = _hooks(running, value)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def hook_sites(module: Any, paths: Mapping[str, str]) -> Callable[[], None]:
    """Make the modules at `paths` (by site) tell `current_site` while they run; return what takes the hooks away."""
    return hooks_of(module, paths, {})()


def _layers_of(module: Any) -> Iterator[Any]:
    if isinstance(module, torch.nn.Module):
        yield from (each for each in module.modules() if hasattr(getattr(each, PREFERRED, None), "function"))


def _last(running: Running) -> Any:
    values = running.get()
    return values[-1] if values else None


@functools.cache
def _hooks(running: Running, value: str | None) -> tuple[Any, Any]:
    # the same two functions whenever a module is hooked again, so that a compiled block need not be compiled again

    @torch.compiler.disable  # a compiled block would keep what it was traced with
    def enter(module: Any, *_: Any) -> None:
        running.set((*running.get(), module if value is None else value))

    @torch.compiler.disable
    def leave(*_: Any) -> None:
        running.set(running.get()[:-1])

    return enter, leave
