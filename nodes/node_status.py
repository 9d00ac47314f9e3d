"""The text that a node shows on itself."""

from collections.abc import Callable, Sequence

from ..attention.shown import printable


def show_on_node(node_id: str | None, notes: Sequence[str] = ()) -> Callable[[str], None]:
    """Return a function that shows a text, and `notes` below it, on a node of the open workflow."""

    def show(text: str) -> None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            lines = "\n".join([text, *notes]).split("\n")
            server.send_progress_text("\n".join(map(printable, lines)), node_id)

    return show
