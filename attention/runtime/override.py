"""The callable in the host application's override slot, and the wrapper that prepares each forward for it.

The override hands a call to `run_site` where the plan names its site; every other call, and what `run_site`
declines, goes to what was there before: the previous override, the layer's own attention, or the host application's.
Nothing here imports ComfyUI; `patching/install.py` installs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..hosts import ModelCall
from ..hosts.site_hooks import current_site, preferred_attention
from ..site_call import HostCall, bhnd_shape
from .run_site import run_site
from .runtime import CALL_KEY, RUNTIME_KEY, Runtime

OVERRIDE_KEY = "optimized_attention_override"
INSIDE_KEY = "_inside_attn_wrapper"  # the core's mark of a call that asked the override already
NODES = {"set_model_optimized_attention": "Model Attention Backend"}  # by function, the core's node that calls it


class Container(Protocol):
    """One tensor of a call with a single owner, as ComfyUI 0.32 and later hand them over."""

    def peek(self) -> Tensor:
        """Return the tensor and keep it."""
        ...

    def take(self) -> Tensor:
        """Return the tensor and let go of it."""
        ...


@dataclass(slots=True)
class Held:
    """A tensor that came without a container."""

    tensor: Tensor

    def peek(self) -> Tensor:
        """Return the tensor and keep it."""
        return self.tensor

    def take(self) -> Tensor:
        """Return the tensor; its owner is the caller, so nothing is let go of."""
        return self.tensor


Inputs = tuple[Container, Container, Container]


@dataclass(frozen=True, slots=True)
class AttentionOverride:
    """What stands in the override slot. It holds no state but what was there before.

    Args:
        previous: the override that was there before.
        core: the host application's attention; calls with containers come without one.
    """

    linearize_override: ClassVar[bool] = True  # recognised by name: the pack may be imported under two names
    previous: Callable[..., Tensor] | None = None
    core: Callable[..., Tensor] | None = None

    @torch.compiler.disable  # decisions and counts are made anew at each call, never traced
    def __call__(
        self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run one attention call: the plan's spec where possible, else what ran before. Same contract as `func`."""

        def host_attention(options: Mapping[str, Any]) -> Tensor:
            return self._below(func, q, k, v, heads, options)

        dense = partial(self._below, func)
        return run_call((Held(q), Held(k), Held(v)), heads, named(args, kwargs), host_attention, dense)

    @torch.compiler.disable
    def container_function(
        self, q: Container, k: Container, v: Container, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run one attention call whose tensors come in containers, which are empty afterwards."""

        def host_attention(options: Mapping[str, Any]) -> Tensor:
            if self.previous is None:
                return (preferred_attention() or self._core())(q, k, v, heads, **{**options, INSIDE_KEY: True})
            if hasattr(self.previous, "container_function"):
                return self.previous.container_function(q, k, v, heads, **options)
            return self.previous(self._core(), q.take(), k.take(), v.take(), heads, **options)

        dense = partial(self._below, self.core) if self.core is not None else None
        return run_call((q, k, v), heads, named(args, kwargs), host_attention, dense)

    def _below(
        self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, options: Mapping[str, Any]
    ) -> Tensor:
        """Return what was there before this override."""
        if self.previous is not None:
            return self.previous(func, q, k, v, heads, **options)
        return (preferred_attention() or func)(q, k, v, heads, **{**options, INSIDE_KEY: True})

    def _core(self) -> Callable[..., Tensor]:
        if self.core is None:
            raise ValueError("an override that is called with containers needs the host application's attention")
        return self.core


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an attention function behind `heads` by name, with its defaults."""
    names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
    defaults = dict(zip(names, (None, None, False, False), strict=True))
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def run_call(
    inputs: Inputs,
    heads: int,
    options: dict[str, Any],
    host_attention: Callable[[Mapping[str, Any]], Tensor],
    dense: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return the output of one attention call in the form that its caller asked for.

    Args:
        inputs: queries, keys and values; emptied where the plan ran them.
        heads: of the queries.
        options: the other arguments of the call, by name.
        host_attention: what runs where the plan does not; given the options without the facts of this forward, so
            that an override of ours further down the chain does not decide the same call again.
        dense: the same for other tensors (q, k, v, heads, options); one call a run may be timed with it.
    """
    transformer_options = options.get("transformer_options") or {}
    runtime, facts = transformer_options.get(RUNTIME_KEY), transformer_options.get(CALL_KEY)
    if facts is None or runtime is None:
        return host_attention(options)
    skip_reshape, skip_output_reshape = options["skip_reshape"], options["skip_output_reshape"]
    shape = bhnd_shape(inputs[0].peek(), heads, skip_reshape)
    num_keys = inputs[1].peek().shape[2 if skip_reshape else 1]
    # a hooked module never issues cross-attention: with fewer queries it splits its own
    is_own = num_keys == shape[2] or current_site() is not None
    site = facts.site_of(runtime.host, transformer_options, shape[2]) if is_own else None
    hidden = {**options, "transformer_options": {k: v for k, v in transformer_options.items() if k != CALL_KEY}}
    if site is None or (site not in runtime.sites and runtime.observe is None):
        return host_attention(hidden)
    with runtime.recording_paused(site):
        query, key, value = (each.peek() for each in inputs)
        call = HostCall(site, facts.layout_at(runtime.host, site), shape, (query, key, value), options)
        clock = runtime.clock
        output = clock.run_call(query.device, partial(run_site, runtime, facts, call))
        if clock.has_call and output is not None and dense is not None and call.mask is None:
            clock.time_dense(query.device, partial(some_queries, dense, (query, key, value), heads, hidden), shape[2])
        observed = None if runtime.observe is None else call
        del call, query, key, value  # or the containers would not be the last to hold the tensors
        if output is None:
            output = host_attention(hidden)
        else:
            for each in inputs:
                each.take()
            if not skip_output_reshape:
                output = rearrange(output, "b h n d -> b n (h d)")
        if runtime.observe is not None and observed is not None:
            again = None if dense is None else partial(dense, *observed.inputs, heads, hidden)
            runtime.observe(observed.seen(output, again))
        return output


def some_queries(
    dense: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    heads: int,
    options: Mapping[str, Any],
    queries: int,
) -> Tensor:
    """Return dense attention for the first `queries` of a call."""
    query, key, value = tensors
    return dense(query.narrow(2 if options["skip_reshape"] else 1, 0, queries), key, value, heads, options)


def find_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, dict[str, Any]] | None:
    """Return where a model call carries its transformer options (position or name), and the options."""
    candidates: list[tuple[int | str, Any]] = [*kwargs.items(), *enumerate(args)]
    for place, value in candidates:
        if isinstance(value, dict) and RUNTIME_KEY in value:
            return place, value
    return None


def describe_override(override: Any) -> str:
    """Return a name for another node's override, for people: the node, or its function or class and its package."""
    while isinstance(override, partial):
        override = override.func
    kind = override if hasattr(override, "__qualname__") else type(override)
    package = str(kind.__module__).replace("\\", "/").rsplit("/", 1)[-1]
    parts = kind.__qualname__.split(".<locals>")[0].split(".")
    return NODES.get(parts[-1]) or f"another override ({parts[0]} of {package})"


def on_top(options: Mapping[str, Any], runtime: Runtime) -> Any:
    """Return the override for a forward: ours, over whatever a later node put in its place."""
    current = options.get(OVERRIDE_KEY)
    if getattr(current, "linearize_override", False):
        return current
    if current is not None:
        runtime.record.below = describe_override(current)
    if runtime.override is None or runtime.override.previous is not current:
        runtime.override = AttentionOverride(current, runtime.core)  # kept: a compiled model would see a new one
    return runtime.override


def model_call_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Note the layout of a forward for the override; the host application calls this around its diffusion model."""
    found = find_options(args, kwargs)
    if found is None:
        return executor(*args, **kwargs)
    place, options = found
    runtime = options[RUNTIME_KEY]
    # apply_model belongs to the model around the diffusion model, and casts the latent later
    module = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
    dtype = getattr(executor.class_obj, "get_dtype_inference", lambda: None)()
    noted = runtime.begin_call(ModelCall(module, args, kwargs, dtype), options)
    noted[OVERRIDE_KEY] = on_top(options, runtime)
    if isinstance(place, int):
        args = (*args[:place], noted, *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: noted}
    output = executor(*args, **kwargs)
    runtime.record.finished += 1
    return output
