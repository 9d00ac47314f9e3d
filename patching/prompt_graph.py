"""The graph of the prompt that is being executed: what made a result, and what tells results apart."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any
from weakref import WeakKeyDictionary

from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

_known: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()  # per prompt, signatures by node id


@dataclass(frozen=True, slots=True)
class Place:
    """A node that is being executed.

    Args:
        prompt_id: of its prompt.
        node_id: its own id; that of a node which another one expanded into while the prompt ran has dots in it.
        prompt: ComfyUI's `DynamicPrompt`, which knows those nodes too.
    """

    prompt_id: str
    node_id: str
    prompt: Any

    def upstream(self) -> tuple[str, ...]:
        """Return signatures of the node and of all that its inputs came from, sources first."""
        return tuple(_signatures(self.prompt, self.node_id).values())

    def results(self) -> Iterator[str]:
        """Yield signatures of the results that this node computes: its own, and of the nodes that expanded into it."""
        node_id: str | None = self.node_id
        while node_id is not None:
            yield _signatures(self.prompt, node_id)[node_id]
            node_id = self.prompt.get_parent_node_id(node_id)


def executing() -> Place | None:
    """Return the node that is being executed in this thread, None outside of a prompt."""
    context = get_executing_context()
    if context is None:
        return None
    state = get_progress_state()
    return Place(context.prompt_id, context.node_id, state.dynprompt) if state.prompt_id == context.prompt_id else None


def _signatures(prompt: Any, node_id: str) -> dict[str, str]:
    """Return, sources first, a hash per node of what its result is computed from: classes and inputs all the way up.

    As in ComfyUI's own cache, ids do not count, so a result that is taken from there keeps its signature.
    """
    graph: dict[str, list[str]] = {}
    waiting = [node_id]
    while waiting:
        found = waiting.pop()
        if found not in graph:
            inputs = prompt.get_node(found)["inputs"].values()
            graph[found] = [value[0] for value in inputs if _is_source(prompt, value)]
            waiting += graph[found]
    known = _known.setdefault(prompt, {})
    order = tuple(TopologicalSorter(graph).static_order())
    for each in order:
        if each not in known:
            known[each] = _signature(prompt, each, known)
    return {each: known[each] for each in order}


def _signature(prompt: Any, node_id: str, known: dict[str, str]) -> str:
    node = prompt.get_node(node_id)
    inputs = {
        name: [known[value[0]], value[1]] if _is_source(prompt, value) else value
        for name, value in node["inputs"].items()
    }
    text = json.dumps([node["class_type"], inputs], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_source(prompt: Any, value: Any) -> bool:
    return is_link(value) and prompt.has_node(value[0])
