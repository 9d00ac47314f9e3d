"""The receipt in a saved picture: which plan and weights ran, on which backend, and how much of the attention.

ComfyUI writes a prompt's `extra_pnginfo` into the pictures it saves. Prompts that hold a Linearize node are noted when
they arrive; when a sampling run ends, its receipt is put there, whether or not the Linearize node itself was cached.
"""

import uuid
from collections import OrderedDict
from typing import Any

from comfy_execution.utils import get_executing_context

from ..attention.plans import Plan, group_sites
from ..attention.runtime import Runtime

KEY = "linearize"
MAX_PROMPTS = 50  # waiting in the queue; older ones are forgotten and their pictures carry no receipt

_pictures_of: OrderedDict[str, dict[str, Any]] = OrderedDict()  # prompt id: what is written into its pictures


def watch_prompts() -> None:
    """Note prompts from now on, if there is a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(note_prompt)


def note_prompt(request: dict[str, Any]) -> dict[str, Any]:
    """Remember where the pictures of a queued prompt take their metadata from; other prompts pass unchanged."""
    nodes = request.get("prompt") or {}
    if not any(str(node.get("class_type", "")).startswith("Linearize") for node in nodes.values()):
        return request
    request["prompt_id"] = request.get("prompt_id") or str(uuid.uuid4())
    info = request.setdefault("extra_data", {}).setdefault("extra_pnginfo", {})
    _pictures_of[request["prompt_id"]] = info
    while len(_pictures_of) > MAX_PROMPTS:
        _pictures_of.popitem(last=False)
    return request


def receipt_of(runtime: Runtime) -> dict[str, Any]:
    """Return the receipt of the last run as plain data."""
    record = runtime.record
    specs = {site: settings.spec for site, settings in runtime.sites.items()}
    weights = sorted({settings.origin for settings in runtime.sites.values() if settings.origin})
    return {
        "plan": Plan(runtime.host.name, rules=group_sites(specs)).to_json(),
        "weights": weights or ["the model's own"],
        "backends": sorted({ran.backend for ran in record.ran}),
        "share_linearized": round(record.share_linearized, 4),
        "share_of_pairs": round(record.share_computed, 4),
        "fell_back": sorted({reason.text for _, reason in record.declined}),
    }


def write_receipt(runtime: Runtime) -> None:
    """Put the receipt of the run that just ended into the pictures of the prompt that is being executed."""
    context = get_executing_context()
    info = _pictures_of.get(context.prompt_id) if context is not None else None
    if info is not None and runtime.record.ran:
        receipt, receipts = receipt_of(runtime), info.setdefault(KEY, [])
        if receipt not in receipts:  # a tiled sampling runs many times alike
            receipts.append(receipt)
