"""The status that a node shows on itself: told to the page that queued the prompt, where `web/status.js` keeps it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..attention.shown import printable
from ..patching.prompt_graph import Place, executing

EVENT = "linearize.status"


def show_on_node(node_id: str | None, notes: Sequence[str] = ()) -> Callable[[str], None]:
    """Return a function that shows a text, its outcome in the first line, and `notes` below it, on a node."""

    def show(text: str) -> None:
        _tell(node_id, "\n".join([text, *notes]), failed=False)

    return show


def show_error(node_id: str | None, text: str) -> None:
    """Show on a node why it failed."""
    _tell(node_id, text, failed=True)


def _tell(node_id: str | None, text: str, *, failed: bool) -> None:
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or node_id is None:
        return
    place = executing()
    status = {
        "node": node_id,
        "type": place.prompt.get_node(node_id)["class_type"] if place and place.prompt.has_node(node_id) else "",
        "workflow": _workflow_id(server, place) if place else "",
        "text": "\n".join(map(printable, text.split("\n"))),
        "failed": failed,
        "at": time.time(),
    }
    server.send_sync(EVENT, status, getattr(server, "client_id", None))


def _workflow_id(server: Any, place: Place) -> str:
    """Return the id of the workflow that is being executed, "" where the prompt came without one."""
    queue = getattr(server, "prompt_queue", None)
    running, _ = queue.get_current_queue_volatile() if queue is not None else ((), ())
    for _, prompt_id, _, extra, *_ in running:
        if prompt_id == place.prompt_id:
            workflow = (extra.get("extra_pnginfo") or {}).get("workflow")
            return str(workflow.get("id") or "") if isinstance(workflow, dict) else ""
    return ""
