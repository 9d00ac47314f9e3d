"""Puts a runtime on a clone of a model patcher: the part that training and `install.py` share."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from types import NoneType
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from ..attention.hosts import Host, find_host
from ..attention.memory import LongLived
from ..attention.runtime.override import OVERRIDE_KEY, AttentionOverride, model_call_wrapper
from ..attention.runtime.runtime import RUNTIME_KEY, Runtime
from ..attention.students.fingerprint import fingerprint

KEY = "linearize"
_is_paused: ContextVar[bool] = ContextVar("the core's recording is paused", default=False)


def host_of(model: Any) -> tuple[Host, Any]:
    """Return the host of a model patcher and its diffusion model.

    Raises:
        ValueError: no host knows the model; the sentence lists the known ones.
    """
    module = model.get_model_object("diffusion_model")
    return find_host(module), module


def runtime_of(model: Any) -> Runtime | None:
    """Return the runtime that a Linearize node put on this model, if one did."""
    return model.model_options.get("transformer_options", {}).get(RUNTIME_KEY)


def model_fingerprint(model: Any) -> Tensor:
    """Return the fingerprint of a model patcher's base weights."""
    host, module = host_of(model)
    return fingerprint([parameter(model, name) for name in host.norm_parameters(module)])


def parameter(model: Any, name: str) -> Tensor:
    """Return a parameter of the diffusion model as numbers, however it is stored, on the CPU and without any patch."""
    key = f"diffusion_model.{name}"
    with model.use_ejected():
        # a state dict may hold packed bytes, or nothing, where the module has what they mean
        layer = comfy.utils.get_attr(model.model, key.rpartition(".")[0])
        value = comfy.utils.get_attr(model.model, key)
    backup = model.backup.get(key)
    return _unpacked(layer, value if backup is None else backup.weight).detach().cpu().clone()


def _unpacked(layer: Any, value: Any) -> Tensor:
    """Return the numbers of a layer's weight that may be packed; only the layer knows how."""
    if getattr(value, "tensor_type", None) is not None:  # of a GGUF pack
        bare = value.to("cpu", copy=True)
        bare.patches = []  # `get_weight` would add them
        value = layer.get_weight(bare, torch.float32)
    elif hasattr(layer, "convert_weight"):  # the core's way to what a LoRA is added to
        value = layer.convert_weight(value, inplace=False)
    return value.as_subclass(torch.Tensor)


def is_as_loaded(model: Any) -> bool:
    """Return whether no node changed a model patcher since its loader made it: no LoRA, sampling setting or hook."""
    return not model.patches and not change_names(model)


def change_names(model: Any) -> list[str]:
    """Return names of what nodes changed on a model patcher beside its weights, sorted.

    A name is a path of keys, such as `wrappers/diffusion_model/pack`; what holds nothing is no change.
    """
    places = ("object_patches", "wrappers", "injections", "hook_patches", "weight_wrapper_patches")
    found = {**model.model_options, **{place: getattr(model, place) for place in places}}
    return sorted(_paths(found, ()))


def _paths(value: Any, keys: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            # an object's own text may hold its address, which differs from run to run
            name = str(key) if isinstance(key, str | int | tuple | NoneType) else type(key).__name__
            yield from _paths(each, (*keys, name))
    elif not isinstance(value, list | tuple | set) or value:
        yield "/".join(keys)


def weight_types(model: Any) -> list[str]:
    """Return the types that a model patcher's weights have, sorted."""
    return sorted({str(weight.dtype) for weight in model.model_state_dict().values()})


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype that a model patcher computes in, where other nodes may have set one."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def install_runtime(patched: Any, runtime: Runtime, module: Any) -> None:
    """Put a runtime and all that finds it on a clone: the override, and the wrapper of the forward."""
    host = runtime.host
    runtime.core = core_attention
    runtime.percent_to_sigma = patched.get_model_object("model_sampling").percent_to_sigma
    runtime.meet(module)
    options = patched.model_options.setdefault("transformer_options", {})
    options[RUNTIME_KEY] = runtime
    current = options.get(OVERRIDE_KEY)
    if not getattr(current, "linearize_override", False):
        options[OVERRIDE_KEY] = AttentionOverride(current, core_attention)
    patched.remove_wrappers_with_key(host.wrapped, KEY)
    patched.add_wrapper_with_key(host.wrapped, KEY, model_call_wrapper)


def watched(model: Any) -> tuple[Any, Runtime]:
    """Return a clone that runs as `model` does, and the runtime whose `observe` is shown its attention calls."""
    host, module = host_of(model)
    patched = model.clone()
    runtime = Runtime(host, {}, LongLived(pause_recording))
    install_runtime(patched, runtime, module)
    return patched, runtime


def trainable(model: Any) -> tuple[Any, Runtime]:
    """Return a copy of a model, with weights of its own that autograd can save, and the runtime of its attention.

    It runs as `model` does, in bf16 where the device has it and in fp32 elsewhere. Call it outside inference mode.

    Raises:
        ValueError: the model's loader cannot load it a second time, or no host knows it.
    """
    host, _ = host_of(model)
    if getattr(model, "cached_patcher_init", None) is None:
        raise ValueError(
            "the node that loaded this model cannot load it a second time, which fine-tuning needs; load it with "
            "ComfyUI's own Load Diffusion Model or Load Checkpoint"
        )
    patched = model.clone(disable_dynamic=True, force_deepcopy=True)
    in_bf16 = comfy.model_management.should_use_bf16(patched.load_device, prioritize_performance=False)
    patched.set_model_compute_dtype(torch.bfloat16 if in_bf16 else torch.float32)
    patched.model.requires_grad_(False)
    for name in weights_without_backward(patched.model):
        patched.add_weight_wrapper(name, _unpacked_by_layer)
    runtime = Runtime(host, {}, LongLived(pause_recording))
    install_runtime(patched, runtime, patched.get_model_object("diffusion_model"))
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _load_whole)
    return patched, runtime


def weights_without_backward(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights, by name, that the core multiplies with as they are packed, which it does forward only."""
    found = {}
    for name, layer in module.named_modules():
        weight, kind = getattr(layer, "weight", None), getattr(layer, "quant_format", "")
        if isinstance(weight, QuantizedTensor) and not QUANT_ALGOS.get(kind, {}).get("quantize_input", True):
            found[f"{name}.weight"] = weight
    return found


def _unpacked_by_layer(weight: Tensor) -> Tensor:
    """Change nothing: a layer unpacks its weight before it gives it to any function."""
    return weight


def _load_whole(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Have the core place all weights on the device: a backward pass cannot bring them back one by one."""
    return executor(*args, **{**kwargs, "force_full_load": True})


def core_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Return what ComfyUI's attention does, chosen when it is called: a flag or another node may change it."""
    return comfy.ldm.modules.attention.optimized_attention(*args, **kwargs)


def override_below(model: Any) -> Any:
    """Return the attention override that other nodes put on a model, None where there is none."""
    found = model.model_options.get("transformer_options", {}).get(OVERRIDE_KEY)
    while getattr(found, "linearize_override", False):
        found = found.previous
    return found


def attention_below(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the attention that a model has without this pack, for (B, H, N, D)."""
    override = override_below(model)
    run = core_attention if override is None else partial(override, core_attention)
    return lambda query, key, value: run(query, key, value, query.shape[1], skip_reshape=True, skip_output_reshape=True)


def stop_if_interrupted() -> None:
    """Raise ComfyUI's own exception where the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextlib.contextmanager
def pause_recording() -> Iterator[None]:
    """Enter ComfyUI's pause for allocations that a recorded block must not hold; a no-op where it records none.

    Pauses do not count: the first that ends would end them all, so an inner one is none.

    Source: comfy.model_prefetch of ComfyUI 0.38; 0.30 and 0.33 have no recording.
    """
    if _is_paused.get():
        yield
        return
    try:
        from comfy.model_prefetch import pause_malloc_graph  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        pause_malloc_graph = contextlib.nullcontext
    token = _is_paused.set(True)
    try:
        with pause_malloc_graph():
            yield
    finally:
        _is_paused.reset(token)
