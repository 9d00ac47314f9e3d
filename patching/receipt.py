"""The receipt in a saved picture: which plan, weights and backends ran, and on how much of the attention.

ComfyUI gives every node that saves one and the same `extra_pnginfo`, whose keys it writes into the file. A prompt that
holds a Linearize node gets one that answers by who reads it: a node finds the receipts of the samplings upstream of it,
whether they ran in this prompt or their results came from ComfyUI's cache.
"""

import copy
from collections import OrderedDict
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from ..attention.runtime.record import once
from ..attention.runtime.runtime import Runtime
from .prompt_graph import Place, executing

KEY = "linearize"
MAX_RESULTS = 1000  # whose receipts are kept, the last ones used; ComfyUI itself caches those of one prompt

_receipts: OrderedDict[str, tuple[str, list[dict[str, Any]]]] = OrderedDict()  # by signature: prompt id, receipts


class PictureInfo(dict[str, Any]):
    """A prompt's `extra_pnginfo` which shows each node that reads it the receipts of its own picture.

    Elsewhere, and stored, it is a plain dictionary: copies, JSON and pickles of it are.
    """

    def _shown(self) -> dict[str, Any]:
        own = dict(dict.items(self))
        receipts = receipts_here()
        return {**own, KEY: receipts} if receipts else own

    def __getitem__(self, key: str) -> Any:
        return self._shown()[key] if key == KEY else dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        return self._shown().get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._shown()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown())

    def __len__(self) -> int:
        return len(self._shown())

    def keys(self) -> KeysView[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._shown().keys()

    def values(self) -> ValuesView[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._shown().values()

    def items(self) -> ItemsView[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._shown().items()

    def copy(self) -> dict[str, Any]:
        return self._shown()

    def __or__(self, other: Any) -> Any:
        return self._shown() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._shown()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._shown(),)


def watch_prompts() -> None:
    """Note prompts from now on, if there is a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(note_prompt)


def note_prompt(request: dict[str, Any]) -> dict[str, Any]:
    """Give a queued prompt that holds a Linearize node pictures with receipts; others pass unchanged.

    So does one whose `extra_pnginfo` is no plain dictionary. An entry `linearize` in it is of another picture.
    """
    try:
        nodes = request["prompt"].values()
        if any(str(node["class_type"]).startswith("Linearize") for node in nodes):
            extra_data = request.setdefault("extra_data", {})
            info = extra_data.get("extra_pnginfo")
            if info is None or type(info) is dict:
                extra_data["extra_pnginfo"] = PictureInfo((k, v) for k, v in (info or {}).items() if k != KEY)
    except (KeyError, TypeError, AttributeError):  # no prompt as ComfyUI takes it, which it says itself
        pass
    return request


def receipt_of(runtime: Runtime) -> dict[str, Any]:
    """Return the receipt of the last run as plain data: no text but the pack's own words and names of files."""
    record = runtime.record
    weights = sorted({settings.origin for settings in runtime.sites.values() if settings.origin})
    trained = {site for site, settings in runtime.sites.items() if settings.trained}
    return {
        "plan": runtime.plan().to_json(),
        "weights": weights or ["the model's own"],
        "backends": sorted({ran.backend for ran in record.ran}),
        "share_linearized": round(record.share_linearized, 4),
        "share_of_pairs": round(record.share_computed, 4),
        # codes: a reason's sentence can quote an exception, which can quote anything
        "fell_back": sorted(
            {f"{reason.code} (trained weights)" if site in trained else reason.code for site, reason in record.declined}
        ),
    }


def write_receipt(runtime: Runtime) -> None:
    """Keep the receipt of the run that just ended for the pictures that are made of its result."""
    try:
        place = executing()
        if place is not None:
            _keep(place, receipt_of(runtime) if runtime.record.ran else None)
    except Exception as error:  # whatever it is, a receipt must not cost the user a picture
        once.warning(f"Linearize: a picture gets no receipt, which failed with {type(error).__name__}")


def _keep(place: Place, receipt: dict[str, Any] | None) -> None:
    for signature in place.results():
        prompt_id, receipts = _receipts.pop(signature, ("", []))
        if prompt_id != place.prompt_id:  # this node runs anew
            receipts = []
        if receipt is not None and receipt not in receipts:  # a tiled sampling runs many times alike
            receipts.append(receipt)
        _receipts[signature] = (place.prompt_id, receipts)
    while len(_receipts) > MAX_RESULTS:
        _receipts.popitem(last=False)


def receipts_here() -> list[dict[str, Any]]:
    """Return the receipts of what is upstream of the node that is being executed, in the order of the graph."""
    found: list[dict[str, Any]] = []
    try:
        place = executing()
        for signature in place.upstream() if place is not None else ():
            if signature in _receipts:
                _receipts.move_to_end(signature)
                found += [each for each in _receipts[signature][1] if each not in found]
    except Exception as error:  # as above
        once.warning(f"Linearize: a picture gets no receipt, which failed with {type(error).__name__}")
    return copy.deepcopy(found)
