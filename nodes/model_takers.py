"""What other nodes of the graph keep of a model with trained weights: merges and saves of models.

Both read the weights and nothing else, and call no hook of the pack; so the graph is read when the node runs that put
the weights in.
"""

from collections.abc import Iterator
from typing import Any

from comfy_execution.graph_utils import is_link

from ..attention.runtime.record import once
from ..patching.prompt_graph import executing

SAVES = ("ModelSave", "CheckpointSave")
MERGES, SECOND = "ModelMerge", "model2"  # how their ids begin, and the input that gives weights only
MODEL = "model"  # how inputs for models are named, a number behind it where there are several
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
    place = executing()
    if node_id is None or place is None:
        return ()
    notes = tuple(sorted(set(_notes(place.prompt, node_id))))
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
    for taker, node in graph.items():
        for name, value in node["inputs"].items():
            if name.startswith(MODEL) and is_link(value) and value[0] == source:
                yield taker, name
