"""The only module of the nodes that touches a model patcher: it installs the runtime on a clone.

What is installed is stateless: the override, the wrapper and the callbacks find the `Runtime` in the transformer
options of the model they are called for, so a clone of the model needs nothing but a runtime of its own.
"""

import contextlib
import copy
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.lora
import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..attention.backends import refused
from ..attention.feature_maps import Maps
from ..attention.high_res import with_proportional_scale
from ..attention.hosts import Host, WeightTarget, find_host
from ..attention.memory import LongLived
from ..attention.runtime import (
    OVERRIDE_KEY,
    RUNTIME_KEY,
    AttentionOverride,
    Runtime,
    SiteSettings,
    model_call_wrapper,
)
from ..attention.specs import MappedSpec
from ..attention.student import StudentParameters, new_maps
from .injection import site_injection
from .receipt import write_receipt

KEY = "linearize"
PROPORTIONAL_KEY = "linearize_proportional"  # in the transformer options: clear windows use the proportional scale
ROPE_KEY = "diffusion_model.pe_embedder"
DELTAS = "linearize_deltas"  # attachment: the sites of a student and the patches of its deltas
DELTA_SUFFIX = re.compile(r"\.(lora_up|lora_down|lora_A|lora_B|alpha|diff_b|diff|set_weight)(?:\.weight)?$")
PlacedTensor = tuple[str, WeightTarget, Tensor]  # site, rows of the model's parameter, what replaces them


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
    model: Any,
    sites: Mapping[str, SiteSettings],
    status: Callable[[str], None] | None = None,
    *,
    projections: Sequence[PlacedTensor] = (),
    pools: Mapping[str, Tensor] | None = None,
    maps: Mapping[str, Maps] | None = None,
    deltas: Mapping[str, Tensor] | None = None,
) -> tuple[Any, Runtime]:
    """Return a clone of `model` whose sites run as asked, and the runtime that will record it.

    Sites that an earlier Linearize node named keep its settings unless `sites` names them; there is one override all
    the same. `model` is not changed.

    Args:
        model: a model patcher.
        sites: settings per site id.
        status: told the summary when a sampling run ends.
        projections: distilled weights of `sites`, which replace the model's own below every LoRA.
        pools: pooling weights by site.
        maps: feature maps by site; a site that needs some and is not named gets untrained ones.
        deltas: changes of weights under ComfyUI's LoRA keys.

    Raises:
        ValueError: no backend runs the spec of a site, or the model lacks a parameter that a projection or a delta
            changes.
    """
    host, module = host_of(model)
    found = dict(maps or {})
    for site in host.sites(module):
        if site.id not in sites:
            continue
        spec = sites[site.id].spec
        reason = refused(spec, site.num_heads, site.head_dim)
        if reason is not None:
            raise ValueError(f"{site.id}: {reason.text}")
        if isinstance(spec, MappedSpec) and site.id not in found:
            found[site.id] = new_maps(spec, site.num_heads, site.head_dim)
    runtime = Runtime(host, dict(sites), LongLived(pause_recording), StudentParameters(pools, found), status)
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    earlier = options.get(RUNTIME_KEY)
    if earlier is not None:
        runtime = runtime.merged_over(earlier)
    options[RUNTIME_KEY] = runtime
    _scale_windows(options)
    current = options.get(OVERRIDE_KEY)
    if not getattr(current, "linearize_override", False):
        options[OVERRIDE_KEY] = AttentionOverride(previous=current)
    patched.remove_wrappers_with_key(host.wrapped, KEY)
    patched.add_wrapper_with_key(host.wrapped, KEY, model_call_wrapper)
    if host.site_modules(module):
        patched.set_injections(KEY, [site_injection(host)])
    for event, callback in CALLBACKS:
        patched.remove_callbacks_with_key(event, KEY)
        patched.add_callback_with_key(event, KEY, callback)
    replace_projections(patched, sites, projections)
    replace_deltas(patched, sites, deltas or {})
    patched.remove_additional_models(KEY)
    if len(runtime.parameters.sites):
        patched.set_additional_models(KEY, [parameter_patcher(runtime.parameters)])
    return patched, runtime


def set_proportional_scale(model: Any) -> Any:
    """Return a clone whose clear windows use the proportional scale, those of later Linearize nodes too."""
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    options[PROPORTIONAL_KEY] = True
    _scale_windows(options)
    return patched


def _scale_windows(options: dict[str, Any]) -> None:
    """Replace the clear specs of a clone's own runtime, where a node asked for the proportional scale."""
    runtime = options.get(RUNTIME_KEY)
    if runtime is not None and options.get(PROPORTIONAL_KEY):
        runtime.sites = {
            site: replace(settings, spec=with_proportional_scale(settings.spec))
            for site, settings in runtime.sites.items()
        }


def rope_base_of(model: Any) -> float:
    """Return the base of the model's rotary embedding as patched so far.

    Raises:
        ValueError: another node put in an embedding that has no base.
    """
    base = getattr(model.get_model_object(ROPE_KEY), "theta", None)
    if base is None:
        raise ValueError("the model's position embedding has no base to stretch; take out the node that replaced it")
    return float(base)


def set_rope_base(model: Any, factor: float) -> Any:
    """Return a clone whose rotary embedding has `factor` times the base of the one that `model` has.

    Raises:
        ValueError: another node put in an embedding that has no base.
    """
    base = rope_base_of(model)
    embedder = copy.copy(model.get_model_object(ROPE_KEY))  # it has no parameters, so a shallow copy is its own
    embedder.theta = base * factor
    patched = model.clone()
    patched.add_object_patch(ROPE_KEY, embedder)
    return patched


def replace_projections(patched: Any, sites: Iterable[str], projections: Sequence[PlacedTensor]) -> None:
    """Put whole projections under all other patches of a clone, so that LoRAs before and after add to them.

    What an earlier Linearize node put there for the same sites is taken away first.

    Raises:
        ValueError: the model lacks a parameter.
    """
    earlier: dict[str, list[tuple[str, Any]]] = dict(patched.get_attachment(KEY) or {})
    for site in sites:
        take_away(patched, earlier.pop(site, []))
    wanted = {
        (f"diffusion_model.{target.key}", (0, target.start, target.shape[0])): (site, ("set", (tensor,)))
        for site, target, tensor in projections
    }
    accepted = patched.add_patches({place: value for place, (_, value) in wanted.items()})
    if len(accepted) != len(wanted):
        missing = sorted(key for key, _ in set(wanted) - set(accepted))
        raise ValueError(f"this model has no parameter {missing[0]} to put distilled weights into")
    for (key, _), (site, value) in wanted.items():
        entry = next(each for each in patched.patches[key] if each[1] is value)
        patched.patches[key] = [entry, *(each for each in patched.patches[key] if each is not entry)]
        earlier[site] = [*earlier.get(site, []), (key, entry)]
    patched.patches_uuid = uuid.uuid4()
    patched.set_attachments(KEY, earlier)


def take_away(patched: Any, entries: Iterable[tuple[str, Any]]) -> None:
    """Remove patches of ours, by identity, from a clone."""
    for key, entry in entries:
        left = [each for each in patched.patches.get(key, []) if each is not entry]
        if left:
            patched.patches[key] = left
        else:
            patched.patches.pop(key, None)


def replace_deltas(patched: Any, sites: Iterable[str], deltas: Mapping[str, Tensor]) -> None:
    """Put a student's weight deltas on a clone through ComfyUI's own LoRA loader, under every LoRA.

    The deltas of an earlier student are taken away first if `sites` are all the sites it had.

    Raises:
        ValueError: a delta belongs to no parameter of this model, or has another shape.
    """
    sites = frozenset(sites)
    earlier = patched.get_attachment(DELTAS)
    if earlier is not None and earlier[0] <= sites:
        take_away(patched, earlier[1])
        patched.set_attachments(DELTAS, None)
    if not deltas:
        return
    keys = comfy.lora.model_lora_keys_unet(patched.model, {})
    shapes = {name: tuple(value.shape) for name, value in patched.model_state_dict().items()}
    for name, tensor in deltas.items():
        found = DELTA_SUFFIX.search(name)
        key = keys.get(name[: found.start()]) if found else None
        if found and found[1] == "diff_b" and key is not None:
            key = key.removesuffix(".weight") + ".bias"
        if found is None or key not in shapes:
            raise ValueError(f"the student changes {name}, which this model does not have")
        _check_delta(name, found[1], tuple(tensor.shape), shapes[key])
    loaded = comfy.lora.load_lora(dict(deltas), keys)
    accepted = patched.add_patches(loaded)
    if len(accepted) != len(loaded):
        raise ValueError(f"the student changes {sorted(map(str, set(loaded) - set(accepted)))[0]}, which did not load")
    entries = []
    for key, value in loaded.items():
        entry = next(each for each in patched.patches[key] if each[1] is value)
        patched.patches[key] = [entry, *(each for each in patched.patches[key] if each is not entry)]
        entries.append((key, entry))
    patched.set_attachments(DELTAS, (sites, entries))


def _check_delta(name: str, suffix: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
    fits = {
        "lora_up": found[:1] == needed[:1],
        "lora_B": found[:1] == needed[:1],
        "lora_down": found[1:] == needed[1:],
        "lora_A": found[1:] == needed[1:],
        "diff": found == needed,
        "set_weight": found == needed,
        "diff_b": found == needed,
    }
    if not fits.get(suffix, True):
        raise ValueError(f"the student's {name} has shape {found}, which does not fit this model's {needed}")


def parameter(model: Any, name: str) -> Tensor:
    """Return a parameter of the diffusion model, on the CPU and without any patch."""
    backup = model.backup.get(f"diffusion_model.{name}")
    value = backup.weight if backup is not None else model.model_state_dict()[f"diffusion_model.{name}"]
    return value.detach().cpu().clone()


def parameter_patcher(parameters: StudentParameters) -> Any:
    """Return learned parameters as a model that ComfyUI loads, counts and offloads beside the one they belong to."""
    patcher = comfy.model_patcher.CoreModelPatcher(
        parameters,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # deep clones for several GPUs are made from this
    patcher.cached_patcher_init = (_new_parameter_patcher, (parameters.pools(), parameters.maps()))
    return patcher


def _new_parameter_patcher(pools: Mapping[str, Tensor], maps: Mapping[str, Maps], disable_dynamic: bool = False) -> Any:
    return parameter_patcher(StudentParameters(pools, maps))


def pause_recording() -> contextlib.AbstractContextManager[Any]:
    """Return the host's pause for allocations that outlive a block; a no-op where it records none."""
    pause = getattr(comfy.memory_management, "pause_malloc_graph", contextlib.nullcontext)
    return pause()


def show_on_node(node_id: str | None, notes: Sequence[str] = ()) -> Callable[[str], None]:
    """Return a function that shows a text, and `notes` below it, on a node of the open workflow."""

    def show(text: str) -> None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text("\n".join([text, *notes]), node_id)

    return show


def _on_pre_run(patcher: Any) -> None:
    runtime = runtime_of(patcher)
    if runtime is not None:
        runtime.start_run()


def _on_cleanup(patcher: Any) -> None:
    runtime = runtime_of(patcher)
    if runtime is not None:
        runtime.finish_run()
        write_receipt(runtime)


def _on_clone(_: Any, new: Any) -> None:
    runtime = runtime_of(new)
    if runtime is not None:
        new.model_options["transformer_options"][RUNTIME_KEY] = runtime.copy()


CALLBACKS = (
    (CallbacksMP.ON_PRE_RUN, _on_pre_run),
    (CallbacksMP.ON_CLEANUP, _on_cleanup),
    (CallbacksMP.ON_CLONE, _on_clone),
)
