"""What a server tells the page that queued a workflow, as it happens: the frontend's websocket, without a browser."""

import asyncio
import json
import urllib.request
import uuid
from collections.abc import Iterator

import aiohttp

PREVIEW_WITH_METADATA = 4  # the binary message of a picture, of those that ComfyUI sends
ENDS = ("execution_success", "execution_error", "execution_interrupted")
SILENCE_S = 120


def events(server, workflow) -> Iterator[tuple[str, dict]]:
    """Queue a workflow; yield (type, data) of every message until it ended or the server died.

    A picture is ("preview", its metadata with the bytes under "image").
    """
    loop = asyncio.new_event_loop()
    client = uuid.uuid4().hex
    session = socket = None
    try:
        session = loop.run_until_complete(_session())
        socket = loop.run_until_complete(session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0))
        hello = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        loop.run_until_complete(socket.send_str(json.dumps(hello)))
        _queue(server, workflow, client)
        while True:
            message = loop.run_until_complete(socket.receive(timeout=SILENCE_S))
            if message.type == aiohttp.WSMsgType.TEXT:
                found = json.loads(message.data)
                yield found["type"], found.get("data") or {}
                if found["type"] in ENDS:
                    return
            elif message.type == aiohttp.WSMsgType.BINARY:
                if int.from_bytes(message.data[:4]) == PREVIEW_WITH_METADATA:
                    end = 8 + int.from_bytes(message.data[4:8])
                    yield "preview", {**json.loads(message.data[8:end]), "image": message.data[end:]}
            else:  # closed
                return
    finally:
        for each in (socket, session):
            if each is not None:
                loop.run_until_complete(each.close())
        loop.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


def _queue(server, workflow, client: str) -> None:
    body = json.dumps({"prompt": workflow, "client_id": client}).encode()
    request = urllib.request.Request(f"{server.url}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60):
        pass
