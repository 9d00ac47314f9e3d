"""What the plan makes of one attention call: run by a backend, or left to the host with a reason that is counted."""

from dataclasses import replace

from torch import Tensor

from ..kinds.output_map import map_outputs
from ..layout import Reason
from ..planning.cost import attention_cost
from ..site_call import HostCall
from .backends import AUTO, Backend, CallShape
from .decisions import ForwardFacts, backend_for, left_to_host, why_failed
from .record import Ran
from .runtime import Runtime


def run_site(runtime: Runtime, facts: ForwardFacts, call: HostCall) -> Tensor | None:
    """Return what the plan makes of a call, (B, H, N, D), or None where the host's attention has to run; count it."""
    settings = runtime.sites.get(call.site)
    if settings is None:
        return None
    if settings.spec.is_dense:
        runtime.record.count_host(call.site, "dense", call.dense_pairs, None, chosen=True)
        return None
    choice = left_to_host(settings, facts, call.shape[2])
    if choice is not None:
        runtime.record.count_host(call.site, settings.spec.kind, call.dense_pairs, choice, chosen=True)
        return None
    result = runtime.masked_in_another_half(call.site, facts.half) or run_planned(runtime, facts, call)
    if isinstance(result, Reason):
        if result.code == "mask":
            runtime.note_mask(call.site, facts.half)
        runtime.decline(call.site, call.dense_pairs, result)
        return None
    output, backend, shape, has_matrices = result
    _, heads, _, size = call.shape
    cost = attention_cost(settings.spec, shape.layout, heads, size, has_matrices=has_matrices)
    ran, pairs = Ran(call.site, settings.spec.kind, backend.name), cost.flops // (4 * size)
    runtime.record.count_run(ran, shape.layout, pairs, call.dense_pairs)
    runtime.note_output(call.site, output)
    return output


def run_planned(
    runtime: Runtime, facts: ForwardFacts, call: HostCall
) -> tuple[Tensor, Backend, CallShape, bool] | Reason:
    """Return the output, its backend and what that was told, and whether matrices follow; or why the call stays dense.

    Where `auto` chose a backend that then fails, torch is tried too: it computes the same.
    """
    settings, failure = runtime.trusted(call.site), None
    while True:
        found = backend_for(settings, facts, call)
        if isinstance(found, Reason):
            return failure or found
        backend, shape, passed_over = found
        runtime.record.note_passed_over(passed_over)
        failure = None
        try:
            query, key, value = call.bhnd()
            learned = runtime.parameters.learned(call.site, query.device)
            output = backend.run(query, key, value, shape, scale=call.scale, learned=learned, memory=runtime.memory)
            if learned.output is not None:
                output = map_outputs(output, shape.layout, learned.output)
            return output, backend, shape, learned.output is not None
        except Exception as error:  # whatever a device or driver throws must not cost the user a picture
            failure = why_failed(backend.name, error)
        # outside the handler, whose traceback keeps the failed attempt's tensors alive
        if settings.backend != AUTO or backend.name == "torch":
            return failure
        runtime.record.note_passed_over((failure,))
        settings = replace(settings, backend="torch")
