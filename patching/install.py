"""Installs the runtime on a clone of a model, with its settings, weights and callbacks.

What is installed is stateless: the override, the wrapper and the callbacks find the `Runtime` in the transformer
options of the model they are called for, so a clone of the model needs nothing but a runtime of its own.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..attention.kinds.kind import Learned
from ..attention.memory import LongLived
from ..attention.planning.high_res import with_proportional_scale
from ..attention.plans import describe_sites
from ..attention.runtime.backends import refused
from ..attention.runtime.runtime import RUNTIME_KEY, Runtime, SiteSettings
from ..attention.students.learned import StudentParameters, new_maps
from .patcher import KEY, host_of, install_runtime, pause_recording, runtime_of
from .receipt import write_receipt
from .seconds_file import SecondsFile
from .weights import MERGES, PlacedTensor, count_merges, merge_note, replace_deltas, replace_projections

PROPORTIONAL_KEY = "linearize_proportional"  # in the transformer options: clear windows use the proportional scale
ROPE_KEY = "diffusion_model.pe_embedder"


def replaced_notes(model: Any, sites: Iterable[str]) -> list[str]:
    """Return what a node says when `sites`, which it is about to run, have trained weights of an earlier node."""
    earlier = runtime_of(model)
    lost = [site for site in sites if earlier and site in earlier.sites and earlier.sites[site].trained]
    return [f"trained weights of {describe_sites(lost)} that an earlier node put in were taken out"] if lost else []


def part_of_sampling(start_percent: float, end_percent: float) -> tuple[float, float] | None:
    """Return (start, end) of a part of sampling, None for all of it; noise levels are known when sampling begins.

    Raises:
        ValueError: the part is empty.
    """
    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent must be below end_percent, got {start_percent} and {end_percent}; 0 and 1 mean all steps"
        )
    return None if (start_percent, end_percent) == (0.0, 1.0) else (start_percent, end_percent)


def patch_model(
    model: Any,
    sites: Mapping[str, SiteSettings],
    status: Callable[[str], None] | None = None,
    *,
    projections: Sequence[PlacedTensor] = (),
    parameters: StudentParameters | None = None,
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
        parameters: what the sites learned; a site that needs feature maps and has none gets untrained ones.
        deltas: changes of weights under ComfyUI's LoRA keys.

    Raises:
        ValueError: no backend runs the spec of a site, or the model lacks a parameter that a projection or a delta
            changes.
    """
    host, module = host_of(model)
    parameters = parameters or StudentParameters()
    learned, untrained = parameters.by_site(), {}
    for site in host.sites(module):
        if site.id not in sites:
            continue
        spec = sites[site.id].spec
        reason = refused(spec, site.num_heads, site.head_dim)
        if reason is not None:
            raise ValueError(f"{site.id}: {reason.text}")
        own = learned.get(site.id, Learned())
        if spec.has_maps and own.maps is None:
            untrained[site.id] = replace(own, maps=new_maps(spec, site.num_heads, site.head_dim))
    if untrained:
        parameters = StudentParameters(learned | untrained)
    runtime = Runtime(host, dict(sites), LongLived(pause_recording), parameters, status, ledger=SecondsFile())
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    earlier = options.get(RUNTIME_KEY)
    if earlier is not None:
        runtime = runtime.merged_over(earlier)
    install_runtime(patched, runtime, module)
    _scale_windows(options)
    for event, callback in CALLBACKS:
        patched.remove_callbacks_with_key(event, KEY)
        patched.add_callback_with_key(event, KEY, callback)
    replace_projections(patched, sites, projections)
    replace_deltas(patched, host.site_weights(module), sites, deltas or {})
    patched.set_attachments(MERGES, count_merges(patched))
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


def parameter_patcher(parameters: StudentParameters) -> Any:
    """Return learned parameters as a model that ComfyUI loads, counts and offloads beside the one they belong to."""
    patcher = comfy.model_patcher.CoreModelPatcher(
        parameters,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # deep clones for several GPUs are made from this
    patcher.cached_patcher_init = (_new_parameter_patcher, (parameters.by_site(),))
    return patcher


def _new_parameter_patcher(learned: Mapping[str, Learned], disable_dynamic: bool = False) -> Any:
    return parameter_patcher(StudentParameters(learned))


def _on_pre_run(patcher: Any) -> None:
    runtime = runtime_of(patcher)
    if runtime is not None:
        runtime.start_run(patcher.get_model_object("model_sampling").percent_to_sigma)
        trained = [site for site, settings in runtime.sites.items() if settings.trained]
        runtime.record.merged = merge_note(patcher, trained)


def _on_cleanup(patcher: Any) -> None:
    runtime = runtime_of(patcher)
    if runtime is None:
        return
    # a copy for another GPU runs with the settings of the model that was copied, which tells of both
    if runtime.record.forwards or not getattr(patcher, "is_multigpu_base_clone", False):
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
