"""Which site is running, for architectures whose transformer options do not tell: forward hooks on attention modules.

The site is kept per thread, so that model calls in parallel threads do not see each other's.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch

_running: ContextVar[tuple[str, ...]] = ContextVar("sites whose module runs", default=())


def current_site() -> str | None:
    """Return the site whose module is running in this thread, or None outside of all of them."""
    running = _running.get()
    return running[-1] if running else None


def forget_sites() -> None:
    """Start a forward outside of all sites: an interrupt leaves modules without running their hooks."""
    _running.set(())


def hook_sites(module: Any, paths: Mapping[str, str]) -> Callable[[], None]:
    """Make modules tell `current_site` while they run.

    Args:
        module: the model.
        paths: by site, the dotted path of its attention module.

    Returns:
        A function that takes the hooks away.
    """
    handles = []
    for site, path in paths.items():
        enter, leave = _hooks(site)
        attention = module.get_submodule(path)
        handles.append(attention.register_forward_pre_hook(enter))
        handles.append(attention.register_forward_hook(leave, always_call=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _hooks(site: str) -> tuple[Any, Any]:
    @torch.compiler.disable  # a compiled block would keep the site it was traced with
    def enter(*_: Any) -> None:
        _running.set((*_running.get(), site))

    @torch.compiler.disable
    def leave(*_: Any) -> None:
        _running.set(_running.get()[:-1])

    return enter, leave
