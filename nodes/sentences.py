"""What a user reads when a node refuses or fails: one sentence, on the node, as early as it can be said."""

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..patching.prompt_graph import executing
from ..training.engine.loop import OutOfMemory
from ..training.jobs.distributed import OtherProcessFailed
from .node_status import show_error

SENTENCES = (ValueError, OutOfMemory, OtherProcessFailed)  # what the pack raises for people to read


def with_sentences(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Have a node show why it failed; the pack's own sentences are raised again as plain ValueErrors.

    ComfyUI prints an exception's class with its module before the sentence. Anything else, an interrupt too, passes
    unchanged.
    """
    execute = node.execute.__func__  # pyright: ignore[reportFunctionMemberAccess]

    @functools.wraps(execute)
    def execute_and_tell(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return execute(cls, *args, **kwargs)
        except SENTENCES as error:
            place = executing()
            show_error(place.node_id if place else None, str(error))
            if type(error) is ValueError:
                raise
            raise ValueError(str(error)).with_traceback(error.__traceback__) from error

    node.execute = classmethod(execute_and_tell)  # pyright: ignore[reportAttributeAccessIssue]
    return node


def answer(check: Callable[..., Any], *values: Any) -> bool | str:
    """Return what `validate_inputs` answers: True, or the sentence of the ValueError that a check raises.

    ComfyUI hands over None for a linked input; then nothing is checked, as its value is known when the node runs.
    """
    if None in values:
        return True
    try:
        check(*values)
    except ValueError as problem:
        return str(problem)
    return True
