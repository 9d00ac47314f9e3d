"""What can go wrong between the Hub and the disk, and where the token goes; all against a fake Hub."""

import errno
import io
import socket
from types import SimpleNamespace

import pytest

from linearize.attention.hub import partial, transfer
from linearize.attention.hub.download import HubError, HubFile, local_path

FILE = HubFile("owner/repo", "folder/student.safetensors")
TOKEN = "the-token-of-the-test"


# --- broken connections -----------------------------------------------------------------------------------------------


def test_resume_after_a_cut(fake, tmp_path):
    fake.cuts = [4500, 2500]
    seen = []
    assert fake.fetch(tmp_path, progress=lambda done, total: seen.append(done), delays=(0,)).sha256 == fake.SHA256
    assert fake.ranges()[0] is None
    starts = [int(wanted[len("bytes=") : -1]) for wanted in fake.ranges()[1:]]
    assert len(starts) == 2 and 4000 <= starts[0] <= 4500 and starts[0] < starts[1] <= 7000
    assert seen == sorted(seen) and seen[-1] == len(fake.CONTENT)


def test_a_disk_that_takes_little_at_a_time_gets_everything():
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    stream = Slow()
    partial._write(stream, b"0123456789")
    assert stream.getvalue() == b"0123456789"


def test_tries_are_bounded_and_the_next_call_goes_on(fake, tmp_path):
    fake.cuts = [5000, 0, 0, 0]
    fake.refusal(tmp_path, "cut", "5000 of 10000 bytes", "run again")
    assert len(fake.ranges()) == 3  # the first brought bytes, the two without any used up both delays
    assert [path.stat().st_size for path in fake.partials(tmp_path)] == [5000]
    fake.cuts, fake.requests[:] = [], []
    seen = []
    assert fake.fetch(tmp_path, progress=lambda done, total: seen.append(done)).path.read_bytes() == fake.CONTENT
    assert fake.ranges() == ["bytes=5000-"] and fake.partials(tmp_path) == []
    assert seen == sorted(seen) and seen[-1] == len(fake.CONTENT)


def test_a_server_without_ranges_starts_anew_but_not_for_ever(fake, tmp_path):
    fake.has_ranges, fake.cuts = False, [5000]
    seen = []
    assert fake.fetch(tmp_path, progress=lambda done, total: seen.append(done)).sha256 == fake.SHA256
    assert seen == sorted(seen) and seen[-1] == len(fake.CONTENT)
    fake.cuts, fake.requests[:] = [5000] * 50, []
    fake.refusal(tmp_path, "run again", file=HubFile("o/r", "b.safetensors"))
    assert len(fake.ranges()) == 3


def test_a_wrong_part_is_not_appended(fake, tmp_path):
    fake.wrong_range, fake.cuts = True, [5000]
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
    assert fake.ranges() == [None, "bytes=5000-", None]


def test_a_busy_or_expired_file_server_is_asked_again_by_a_new_address(fake, tmp_path):
    fake.busy = [503, 403]
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
    assert len(fake.asked("hub", "GET")) >= 3
    fake.busy = [403] * 9
    fake.refusal(tmp_path, "answered 403", "run again", file=HubFile("o/r", "b.safetensors"))


def test_delays_grow_and_can_be_interrupted(fake, tmp_path):
    fake.busy = [503] * 9

    def stop():
        if len(fake.ranges()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.fetch(tmp_path, delays=(0, 60), should_stop=stop)


def test_should_stop_keeps_what_came(fake, tmp_path):
    class Stopped(Exception):
        pass

    def stop():
        if fake.partials(tmp_path) and fake.partials(tmp_path)[0].stat().st_size >= 3000:
            raise Stopped

    with pytest.raises(Stopped):
        fake.fetch(tmp_path, should_stop=stop)
    assert fake.partials(tmp_path)[0].stat().st_size == 3000
    assert fake.fetch(tmp_path).path.read_bytes() == fake.CONTENT
    assert fake.ranges() == [None, "bytes=3000-"]


def test_a_partial_file_of_older_content_is_not_continued(fake, tmp_path):
    older = tmp_path / f"owner--repo--folder--student.safetensors.{'0' * 16}.partial"
    older.write_bytes(b"older")
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
    assert fake.ranges() == [None] and not older.exists()


# --- wrong content ----------------------------------------------------------------------------------------------------


def test_wrong_hash(fake, tmp_path):
    fake.content = fake.CONTENT[:-1] + bytes([fake.CONTENT[-1] ^ 1])
    fake.refusal(tmp_path, "another checksum", "removed")
    assert (
        fake.partials(tmp_path) == []
        and list(tmp_path.glob("*.json")) == []
        and not local_path(tmp_path, FILE).exists()
    )


@pytest.mark.parametrize("size", [9_000, 11_000, 0])
def test_wrong_size(fake, tmp_path, size):
    fake.content = (fake.CONTENT * 2)[:size]
    fake.refusal(tmp_path, f"has {size} bytes", "states 10000 bytes", "removed")
    assert fake.partials(tmp_path) == [] and not local_path(tmp_path, FILE).exists()
    assert len(fake.ranges()) == 1


def test_a_damaged_partial_file_is_removed(fake, tmp_path):
    damaged = tmp_path / f"owner--repo--folder--student.safetensors.{fake.SHA256[:16]}.partial"
    damaged.write_bytes(b"x" * 3000)
    fake.refusal(tmp_path, "another checksum", "removed")
    assert fake.fetch(tmp_path).sha256 == fake.SHA256


@pytest.mark.parametrize("etag", ["", "abc", "0" * 32])
def test_a_server_without_a_checksum_is_refused(fake, tmp_path, etag):
    fake.etag = etag
    fake.refusal(tmp_path, "checksum", "HF_ENDPOINT")
    assert fake.asked("cdn") == []


def test_disk_full_before(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9_999))
    fake.refusal(tmp_path, "9999 bytes free", "10000", "run again")
    assert fake.asked("cdn") == []


def test_disk_full_meanwhile_keeps_what_came(fake, tmp_path, monkeypatch):
    write = partial._write

    def full(stream, chunk):
        if stream.tell() >= 4000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, chunk)

    monkeypatch.setattr(partial, "_write", full)
    fake.refusal(tmp_path, "is full", "free space", "4000 bytes kept")
    monkeypatch.setattr(partial, "_write", write)
    assert fake.fetch(tmp_path).sha256 == fake.SHA256 and fake.ranges() == [None, "bytes=4000-"]


def test_a_folder_that_cannot_be_made(fake, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    fake.refusal(tmp_path / "file" / "models", "cannot write", "writable")


# --- refusals of the Hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "GatedRepo", ("gated", "accept the licence", "/owner/repo", "own login")),
        (403, "GatedRepo", ("gated", "accept the licence", "/owner/repo", "own login")),
        (403, "", ("accept the licence", "own login")),
        (401, "RepoNotFound", ("no repository 'owner/repo'", "own login")),
        (401, "", ("no repository 'owner/repo'", "own login")),
        (404, "RepoNotFound", ("no repository 'owner/repo'",)),
        (404, "RevisionNotFound", ("no revision 'main'",)),
        (404, "EntryNotFound", ("no file 'folder/student.safetensors'", "'main'")),
        (404, "", ("answered 404", str(FILE))),
        (418, "", ("answered 418",)),
        (503, "", ("answered 503", "by hand")),
        (429, "", ("answered 429", "by hand")),
    ],
)
def test_refusals(fake, tmp_path, status, code, words):
    fake.refuse = (status, code)
    fake.refusal(tmp_path, *words)
    assert fake.partials(tmp_path) == []
    assert len(fake.requests) == (3 if status in (503, 429) else 1)


@pytest.mark.parametrize("value", ["1", "true"])
def test_offline(fake, tmp_path, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    fake.refusal(tmp_path, "HF_HUB_OFFLINE", "by hand", str(local_path(tmp_path, FILE)))
    assert fake.requests == []


def test_no_route(fake, tmp_path, monkeypatch):
    with socket.socket() as unused:  # bound and not listening: refuses connections
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        fake.refusal(tmp_path, "cannot reach 127.0.0.1", "by hand", str(local_path(tmp_path, FILE)))


@pytest.mark.parametrize("endpoint", ["mirror", "ftp://mirror", "https://", "https://user:word@mirror", "http://[x"])
def test_a_wrong_endpoint(fake, tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "word" not in fake.refusal(tmp_path, "HF_ENDPOINT").replace("password", "")
    assert fake.requests == []


# --- the token --------------------------------------------------------------------------------------------------------


def test_the_token_stays_with_the_endpoint(fake, tmp_path):
    fake.fetch(tmp_path)
    assert set(fake.tokens("cdn")) == {None}
    by_path = [(path.startswith("/api/"), headers.get("authorization")) for _, _, path, headers in fake.asked("hub")]
    assert sorted(set(by_path)) == [(False, f"Bearer {fake.TOKEN}"), (True, None)]
    assert all(fake.TOKEN not in path.read_text(errors="ignore") for path in tmp_path.iterdir())


def test_a_resumed_download_keeps_the_token_at_home(fake, tmp_path):
    fake.cuts = [4500, 2500]
    fake.fetch(tmp_path)
    assert len(fake.tokens("cdn")) == 3 and set(fake.tokens("cdn")) == {None}


def test_a_redirect_that_looks_like_the_endpoint_gets_no_token(fake, tmp_path):
    fake.location = lambda fake: f"http://127.0.0.1:{fake.ports['cdn']}\\@127.0.0.1:{fake.ports['hub']}/x"
    fake.fetch(tmp_path)
    assert fake.tokens("cdn") == [None]


def test_no_token_on_the_way_back(fake, tmp_path):
    back = f"http://127.0.0.1:{fake.ports['hub']}/back"
    fake.hold = lambda handler: handler.reply(302, b"", {"Location": back}) or True
    fake.refusal(tmp_path, "redirects more than", "HF_ENDPOINT")
    returned = [headers for _, _, path, headers in fake.asked("hub") if path == "/back"]
    assert returned and all("authorization" not in headers for headers in returned)


def test_a_mirror_over_plain_http_gets_no_token(fake, tmp_path, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: resolve("127.0.0.1" if "mirror" in str(host) else host, *rest, **more),
    )
    monkeypatch.setenv("HF_ENDPOINT", f"http://mirror.test:{fake.ports['hub']}/")
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
    assert set(fake.tokens("hub")) == {None} and set(fake.tokens("cdn")) == {None}
    assert {headers["host"].split(":")[0] for _, _, _, headers in fake.asked("hub")} == {"mirror.test"}


def test_a_mirror_that_redirects_to_the_hub_takes_no_token_along(fake, tmp_path, monkeypatch):
    mirror = f"http://localhost:{fake.ports['cdn']}"
    hub_address = f"http://127.0.0.1:{fake.ports['hub']}"

    def pass_on(handler):
        if "/resolve/" not in handler.path:
            return False
        handler.reply(308, b"", {"Location": hub_address + handler.path})
        return True

    fake.hold = pass_on
    monkeypatch.setenv("HF_ENDPOINT", mirror)
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
    assert set(fake.tokens("hub")) == {None}
    assert fake.tokens("cdn")[0] == f"Bearer {fake.TOKEN}"


@pytest.mark.parametrize(
    ("endpoint", "token"),
    [
        ("https://mirror.test", TOKEN),
        ("http://mirror.test", None),
        ("http://localhost:1", TOKEN),
        ("http://[::1]:1", TOKEN),
        ("http://localhost.mirror.test", None),
        ("http://127.0.0.1.mirror.test", None),
    ],
)
def test_who_may_get_the_token(fake, monkeypatch, endpoint, token):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert transfer.Hub().token == token


def test_a_redirect_from_https_to_plain_http_is_refused(fake, monkeypatch):
    import requests

    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.test")
    client = transfer.Hub()
    response = requests.Response()
    response.status_code, response.headers["Location"] = 302, "http://mirror.test/x"
    response._content_consumed = True
    monkeypatch.setattr(client._session, "request", lambda *args, **kwargs: response)
    with pytest.raises(HubError, match="not https"):
        client.send("GET", "https://mirror.test/x", FILE, 1)


def test_a_password_in_netrc_is_not_sent(fake, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    fake.fetch(tmp_path / "models")
    assert set(fake.tokens("cdn")) == {None}


def test_without_a_login(fake, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    fake.fetch(tmp_path)
    assert set(fake.tokens("hub")) == {None}
