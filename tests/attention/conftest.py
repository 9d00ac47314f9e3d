"""A fake Hub on this machine: one server that names files, another one that holds them."""

import hashlib
import json
import random
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest

from linearize.attention.hub.download import HubError, HubFile, download

sys.path.insert(0, str(Path(__file__).parent))  # for host_calls.py

CONTENT = random.Random(0).randbytes(10_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef" * 2 + "01234567"
TOKEN = "the-token-of-the-test"
FILE = HubFile("owner/repo", "folder/student.safetensors")


@dataclass
class FakeHub:
    """Both servers' behaviour and what they were asked: (server, method, path, headers) in `requests`."""

    CONTENT: ClassVar[bytes] = CONTENT
    SHA256: ClassVar[str] = SHA256
    COMMIT: ClassVar[str] = COMMIT
    TOKEN: ClassVar[str] = TOKEN

    content: bytes = CONTENT
    etag: str = SHA256
    size: int = len(CONTENT)
    licence: dict = field(default_factory=lambda: {"license": "mit"})
    refuse: tuple[int, str] | None = None  # the naming server's status and X-Error-Code
    busy: list[int] = field(default_factory=list)  # statuses of the holding server's next answers
    cuts: list[int] = field(default_factory=list)  # bytes after which its next answers break off
    has_ranges: bool = True
    wrong_range: bool = False
    is_direct: bool = False  # the naming server holds the file itself, as it does small ones
    location: Callable[["FakeHub"], str] = lambda fake: f"http://127.0.0.1:{fake.ports['cdn']}/blob?signature=1"
    hold: Callable[["Handler"], bool] = lambda handler: False  # answers in place of the holding server if it can
    ports: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)

    def asked(self, server=None, method=None):
        return [
            request
            for request in self.requests
            if request[0] == (server or request[0]) and request[1] == (method or request[1])
        ]

    def tokens(self, server):
        return [headers.get("authorization") for _, _, _, headers in self.asked(server)]

    def fetch(self, folder, file=FILE, **options):
        return download(file, folder, **{"allow_download": True, "delays": (0, 0), **options})

    def refusal(self, folder, *words, file=FILE, **options):
        """Assert that the download fails with one sentence that has these words."""
        with pytest.raises(HubError) as caught:
            self.fetch(folder, file, **options)
        text = str(caught.value)
        assert "\n" not in text and not text.endswith(".") and TOKEN not in text
        for word in words:
            assert word in text, text
        return text

    def partials(self, folder):
        return sorted(folder.glob("*.partial"))

    def ranges(self):
        return [headers.get("range") for _, _, _, headers in self.asked("cdn", "GET")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        fake, name = self.server.fake, self.server.name
        headers = {key.lower(): value for key, value in self.headers.items()}
        fake.requests.append((name, self.command, unquote(self.path), headers))
        if name == "cdn":
            self.hold()
        elif self.path.startswith("/api/models/"):
            counts = {"private": False, "downloads": 0, "likes": 0, "tags": [], "siblings": []}
            body = {"id": "owner/repo", "cardData": fake.licence, **counts}
            self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif fake.refuse:
            self.reply(fake.refuse[0], b"", {"X-Error-Code": fake.refuse[1]} if fake.refuse[1] else {})
        elif fake.is_direct:
            self.hold({"X-Repo-Commit": COMMIT, "ETag": f'"{fake.etag}"'})
        else:
            linked = {"X-Repo-Commit": COMMIT, "X-Linked-ETag": f'"{fake.etag}"', "X-Linked-Size": str(fake.size)}
            self.reply(302, b"", {**linked, "Location": fake.location(fake)})

    def hold(self, headers=None):
        fake = self.server.fake
        if fake.hold(self):
            return
        if fake.busy:
            self.reply(fake.busy.pop(0), b"")
            return
        wanted = self.headers.get("Range")
        start = int(wanted[len("bytes=") : -1]) if wanted and fake.has_ranges else 0
        if start and start >= len(fake.content):
            self.reply(416, b"")
            return
        part = {"Content-Range": f"bytes {start + fake.wrong_range}-{len(fake.content) - 1}/{len(fake.content)}"}
        cut = fake.cuts.pop(0) if fake.cuts and self.command == "GET" else None
        self.reply(206 if start else 200, fake.content[start:], {**(headers or {}), **(part if start else {})}, cut)

    def reply(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def fake(monkeypatch):
    from huggingface_hub import constants

    state, servers = FakeHub(), []
    for name in ("hub", "cdn"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.fake, server.name, server.daemon_threads = state, name, True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        state.ports[name] = server.server_address[1]
        servers.append(server)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{state.ports['hub']}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost,mirror.test")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    for module in ("download", "partial"):
        monkeypatch.setattr(f"linearize.attention.hub.{module}.CHUNK", 1000)
    yield state
    for server in servers:
        server.shutdown()
        server.server_close()
