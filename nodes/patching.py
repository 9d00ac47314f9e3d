"""The only module of the nodes that touches a model patcher: it installs the runtime on a clone.

What is installed is stateless: the override, the wrapper and the callbacks find the `Runtime` in the transformer
options of the model they are called for, so a clone of the model needs nothing but a runtime of its own.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import comfy.memory_management
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..attention.hosts import Host, Site, find_host
from ..attention.memory import LongLived
from ..attention.runtime import (
    OVERRIDE_KEY,
    RUNTIME_KEY,
    AttentionOverride,
    Runtime,
    SiteSettings,
    model_call_wrapper,
)

KEY = "linearize"


def host_of(model: Any) -> tuple[Host, Any]:
    """Return the host of a model patcher and its diffusion model.

    Raises:
        ValueError: no host knows the model; the sentence lists the known ones.
    """
    module = model.get_model_object("diffusion_model")
    return find_host(module), module


def sites_of(model: Any) -> tuple[Site, ...]:
    """Return the self-attention sites of a model patcher."""
    host, module = host_of(model)
    return host.sites(module)


def runtime_of(model: Any) -> Runtime | None:
    """Return the runtime that a Linearize node put on this model, if one did."""
    return model.model_options.get("transformer_options", {}).get(RUNTIME_KEY)


def sigma_range(model: Any, start_percent: float, end_percent: float) -> tuple[float, float] | None:
    """Return the (highest, lowest) noise level of a part of sampling, None for all of it.

    Raises:
        ValueError: the part is empty.
    """
    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent must be below end_percent, got {start_percent} and {end_percent}; 0 and 1 mean all steps"
        )
    if (start_percent, end_percent) == (0.0, 1.0):
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start_percent)), float(sampling.percent_to_sigma(end_percent))


def patch_model(
    model: Any, sites: Mapping[str, SiteSettings], status: Callable[[str], None] | None = None
) -> tuple[Any, Runtime]:
    """Return a clone of `model` whose sites run as asked, and the runtime that will record it.

    Sites that an earlier Linearize node named keep its settings unless `sites` names them; there is one override all
    the same. `model` is not changed.

    Args:
        model: a model patcher.
        sites: settings per site id.
        status: told the summary when a sampling run ends.
    """
    host, _ = host_of(model)
    runtime = Runtime(host, dict(sites), LongLived(pause_recording), status)
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    earlier = options.get(RUNTIME_KEY)
    if earlier is not None:
        runtime = runtime.merged_over(earlier)
    options[RUNTIME_KEY] = runtime
    current = options.get(OVERRIDE_KEY)
    if not getattr(current, "linearize_override", False):
        options[OVERRIDE_KEY] = AttentionOverride(previous=current)
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, model_call_wrapper)
    for event, callback in CALLBACKS:
        patched.remove_callbacks_with_key(event, KEY)
        patched.add_callback_with_key(event, KEY, callback)
    return patched, runtime


def pause_recording() -> contextlib.AbstractContextManager[Any]:
    """Return the host's pause for allocations that outlive a block; a no-op where it records none."""
    pause = getattr(comfy.memory_management, "pause_malloc_graph", contextlib.nullcontext)
    return pause()


def show_on_node(node_id: str | None) -> Callable[[str], None]:
    """Return a function that shows a text on a node of the open workflow."""

    def show(text: str) -> None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text(text, node_id)

    return show


def _on_pre_run(patcher: Any) -> None:
    runtime = runtime_of(patcher)
    if runtime is not None:
        runtime.start_run()


def _on_cleanup(patcher: Any) -> None:
    runtime = runtime_of(patcher)
    if runtime is not None:
        runtime.finish_run()


def _on_clone(_: Any, new: Any) -> None:
    runtime = runtime_of(new)
    if runtime is not None:
        new.model_options["transformer_options"][RUNTIME_KEY] = runtime.copy()


CALLBACKS = (
    (CallbacksMP.ON_PRE_RUN, _on_pre_run),
    (CallbacksMP.ON_CLEANUP, _on_cleanup),
    (CallbacksMP.ON_CLONE, _on_clone),
)
