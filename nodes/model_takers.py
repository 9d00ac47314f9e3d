"""What other nodes of the graph keep of a model with trained weights: merges and saves of whole models.

Both read the weights and nothing else, and call no hook of the pack; so the graph is read when the node runs that put
the weights in.
"""

from collections.abc import Iterator
from typing import Any

from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from nodes import NODE_CLASS_MAPPINGS  # pyright: ignore[reportAttributeAccessIssue]  # the core's

from ..attention.record import once

SAVES = ("ModelSave", "CheckpointSave")
MERGES, SECOND = "ModelMerge", "model2"  # how their ids begin, and the input that gives weights only
NOT_SAMPLED = "not sampled yet"  # the first line of a status before there is a record
SAVED = (
    "{} writes weights only, trained ones without the plan and feature maps that they were trained for; to keep a "
    "student, use Save Linearized Attention"
)
MERGED = (
    "{} takes this model as model2, and so its weights only, without the plan and feature maps that they were trained "
    "for; connect it as model1 to keep those"
)


def taker_notes(node_id: str | None) -> tuple[str, ...]:
    """Return a sentence per sort of node that takes trained weights from behind `node_id` without their attention."""
    context, state = get_executing_context(), get_progress_state()
    if node_id is None or context is None or state.prompt_id != context.prompt_id:
        return ()
    notes = tuple(sorted(set(_notes(state.dynprompt, node_id))))
    for note in notes:
        once.warning(f"Linearize: {note}")
    return notes


def _notes(prompt: Any, node_id: str) -> Iterator[str]:
    graph = {each: prompt.get_node(each) for each in prompt.all_node_ids()}
    waiting, seen = [node_id], {node_id}
    while waiting:
        for taker, name in _takers(graph, waiting.pop()):
            kind = graph[taker]["class_type"]
            if kind in SAVES:
                yield SAVED.format(kind)
            elif kind.startswith(MERGES) and name == SECOND:
                yield MERGED.format(kind)
            elif taker not in seen:
                seen.add(taker)
                waiting.append(taker)


def _takers(graph: dict[str, Any], source: str) -> Iterator[tuple[str, str]]:
    """Yield the nodes, and their inputs, that take a model from a node."""
    outputs = (
        getattr(NODE_CLASS_MAPPINGS.get(graph[source]["class_type"]), "RETURN_TYPES", ()) if source in graph else ()
    )
    models = {slot for slot, kind in enumerate(outputs) if kind == "MODEL"}
    for taker, node in graph.items():
        for name, value in node["inputs"].items():
            if is_link(value) and value[0] == source and value[1] in models:
                yield taker, name
