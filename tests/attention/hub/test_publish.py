"""Publishing: nothing is sent before it is asked for, one commit then, and the token goes to the endpoint only."""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

from linearize.attention.hub.download import parse_hub_file
from linearize.attention.hub.model_card import describe_student, model_card, spec_errors
from linearize.attention.hub.publish import describe_publication, prepare, publish
from linearize.attention.hub.transfer import HubError, without_address
from linearize.attention.plans import Plan
from linearize.attention.specs import ClearSpec, HybridSpec
from linearize.attention.students.file import StudentFile, load_student, save_student
from linearize.attention.students.tensor_file import FileProblem
from linearize.attention.words import file_size

TOKEN = "the-token-of-the-test"
REPO = "owner/repo"
NAME = "student_00001_.safetensors"


def student(**fields):
    plan = Plan("flux", rules=(("single.0-1", ClearSpec(8)), ("double.0", ClearSpec(4, down_factor=2))))
    errors = {"double.0": 0.25, "single.0": 0.01, "single.1": 0.03}
    pool = {"double.0.pool": torch.full((2, 2), 0.25)}
    return StudentFile(**{"host": "flux", "plan": plan, "site_errors": errors, "parameters": pool, **fields})


@pytest.fixture
def path(tmp_path):
    file = tmp_path / NAME
    save_student(file, student(base_model="black-forest-labs/FLUX.1-dev", licence="mit", recipe={"seed": 3}))
    return file


def front(card):
    """Return the YAML of a card, as the Hub reads it, and its body."""
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_the_file_tells(path):
    card = prepare(path, REPO).card
    head, body = front(card)
    assert head["license"] == "mit" and head["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert head["base_model_relation"] == "adapter" and "linearize-flux" in head["tags"]
    assert body.lstrip().startswith("# repo\n")
    for words in (
        "FLUX.1", "| clear radius 8 | single.0-1 | 2 | 0.02 | 0.03 at single.1 |",
        "| clear radius 4 down\\_factor 2 | double.0 | 1 | 0.25 | 0.25 at double.0 |", "All other sites stay dense.",
        f"`{REPO}/{NAME}` into `hub_file`", "models/linearize", '"seed": 3',
    ):  # fmt: skip
        assert words in body, words


def test_a_card_of_little():
    bare = StudentFile(host="flux", plan=Plan("flux", HybridSpec(4, "favor"), (("double", ClearSpec(3)),)))
    head, body = front(model_card(bare, prepare_file(), 10))
    assert "license" not in head and "base_model" not in head
    assert "| base model | not stated |" in body and "The file does not say." in body
    assert "| clear radius 3 | double | 0 | not measured |  |" in body
    assert "| hybrid rate 4 feature\\_map favor | all other sites | 0 | not measured |  |" in body
    assert "stay dense" not in body
    dense = StudentFile(host="flux", plan=Plan("flux"))
    assert "Every site stays dense." in model_card(dense, prepare_file(), 10)
    assert describe_student(dense)[-1] == "every site stays dense"


def prepare_file():
    from linearize.attention.hub.transfer import HubFile

    return HubFile(REPO, NAME)


@pytest.mark.parametrize(
    ("licence", "head"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("FLUX.1 [dev] Non-Commercial", {"license": "other", "license_name": "flux.1-dev-non-commercial"}),
        ("???", {"license": "other", "license_name": "not-named"}),
    ],
)
def test_licences_as_the_hub_reads_them(licence, head):
    found, body = front(model_card(student(licence=licence), prepare_file(), 10))
    assert {key: value for key, value in found.items() if key.startswith("license")} == head
    assert "| licence |" in body


def test_texts_of_a_file_cannot_write_the_card():
    """A stranger's file may hold anything."""
    evil = "x\n---\nlicense: mit\n# Fake | <script>alert(1)</script> [a](b) `c` *d*"
    card = model_card(
        student(base_model=evil, licence=evil, pair_id=evil, recipe={"a": "```\n# Fake", "b": "\ud800"},
                site_errors={evil: 0.5, "single.0": 0.1}),
        prepare_file(), 10,
    )  # fmt: skip
    head, body = front(card)
    assert (
        head["license"] == "other" and re.fullmatch(r"[a-z0-9.-]+", head["license_name"]) and "base_model" not in head
    )
    assert not re.search(r"(?<!\\)<script", body) and "\n# Fake" not in body and body.count("```") == 2
    card.encode("utf-8")


@pytest.mark.parametrize(
    ("num_bytes", "size"),
    [(0, "0.0 kB"), (1500, "1.5 kB"), (10**6, "1.0 MB"), (12_345_678, "12.3 MB"), (3 * 10**9, "3,000.0 MB")],
)
def test_sizes_are_told_in_decimal_thousands(num_bytes, size):
    assert file_size(num_bytes) == size


def test_errors_belong_to_the_spec_that_holds():
    plan = Plan("flux", ClearSpec(2), (("single", ClearSpec(4)), ("single.1", ClearSpec(2))))
    rows = spec_errors(StudentFile(host="flux", plan=plan, site_errors={"double.0": 1, "single.0": 2, "single.1": 3}))
    assert [(row.spec, row.sites, row.errors) for row in rows] == [
        (ClearSpec(4), "single", {"single.0": 2}),
        (ClearSpec(2), "single.1,all other sites", {"double.0": 1, "single.1": 3}),
    ]


# --- before anything is sent ------------------------------------------------------------------------------------------


def test_preparing_touches_no_network(path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    publication = prepare(path, f" {REPO} ")
    text = describe_publication(publication, True, path.with_name("README.md"))
    assert (
        "to owner/repo, private if it is made now:" in text
        and f"- {NAME}, {path.stat().st_size / 1000:.1f} kB" in text
        and "# repo" in text
    )
    assert "licence mit" in text


@pytest.mark.parametrize("repo", ["", "owner", "owner/../x", "owner/name/more", "o wner/r", "../r"])
def test_repositories_that_are_none(path, repo):
    with pytest.raises(ValueError) as caught:
        prepare(path, repo)
    assert "a Hub repository is owner/name" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pasted", "read"),
    [
        ("https://huggingface.co/o/r", "o/r"),
        ("huggingface.co/o/r/", "o/r"),
        ("https://hf.co/o/r/tree/main/folder", "o/r"),
        ("https://huggingface.co/o/r/blob/main/folder/file.safetensors", "o/r/folder/file.safetensors"),
        ("https://huggingface.co/o/r/resolve/v2/file.safetensors?download=true", "o/r/file.safetensors@v2"),
        ("https://huggingface.co/o/r/blob/refs%2Fpr%2F1/a/file.safetensors", "o/r/a/file.safetensors@refs/pr/1"),
        ("o/r/file.safetensors@v2", "o/r/file.safetensors@v2"),
    ],
)
def test_a_pasted_address_of_the_hub_is_read(path, pasted, read):
    assert without_address(pasted) == read
    if ".safetensors" in read:
        assert str(parse_hub_file(pasted)) == read
    else:
        assert prepare(path, pasted).file.repo == read
        with pytest.raises(ValueError, match="write a Hub file as owner/repo/file.safetensors"):
            parse_hub_file(pasted)


@pytest.mark.parametrize("pasted", ["https://hub/o/r", "https://example.com/o/r/blob/main/f.safetensors"])
def test_an_address_of_something_else_is_refused(path, pasted):
    for read in (without_address, parse_hub_file, lambda text: prepare(path, text)):
        with pytest.raises(ValueError, match="is not the Hub; write owner/repo, or paste an address of the Hub"):
            read(pasted)
    with pytest.raises(ValueError, match="names no repository of models"):
        without_address("https://huggingface.co/datasets/o/r")


def test_a_picture_lies_beside_the_file_and_on_the_card(path):
    name = f"{NAME.removesuffix('.safetensors')}.jpg"
    publication = prepare(path, REPO, b"jpeg")
    assert publication.picture_name == name and f"]({name})" in publication.card
    assert "One picture: an impression, not a measurement." in publication.card
    assert f"- {name}, " in describe_publication(publication, True, path.with_name("README.md"))
    assert prepare(path, REPO).picture_name == "" and "## What it paints" not in prepare(path, REPO).card


def test_an_unfinished_student_says_so_on_its_card(path, tmp_path):
    student = replace(load_student(path), recipe={"transfer": {"unfinished": "35 of 61 updates"}})
    unfinished = tmp_path / "other.safetensors"
    save_student(unfinished, student)
    publication = prepare(unfinished, REPO)
    assert "**Unfinished**: training was cancelled (transfer 35 of 61 updates)" in publication.card
    assert describe_student(student)[0] == "UNFINISHED: transfer 35 of 61 updates"
    assert "nfinished" not in prepare(path, REPO).card


def test_files_that_are_no_students(tmp_path):
    for content in (b"", b"\x80\x04\x95pickled"):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(FileProblem, match=NAME):
            prepare(tmp_path / NAME, REPO)
    spaced = tmp_path / "my student.safetensors"
    save_student(spaced, student())
    with pytest.raises(ValueError, match="with no '..', space"):
        prepare(spaced, REPO)


# --- a fake Hub -------------------------------------------------------------------------------------------------------


class FakeHub:
    """What a Hub does for an upload, and what it was asked: (server, method, path, headers, body)."""

    def __init__(self):
        self.requests, self.ports = [], {}
        self.private, self.is_there, self.files = True, False, [".gitattributes"]
        self.refuse = {}  # path: (status, body)
        self.redirect = None  # path that is sent elsewhere
        self.verify_at = "hub"
        self.stored, self.commit = {}, None

    def asked(self, words):
        return [request for request in self.requests if words in request[2]]

    def answer(self, server, method, path, body):
        if path in self.refuse:
            return self.refuse[path]
        if path == self.redirect and server == "hub":
            return 307, {"Location": f"http://127.0.0.1:{self.ports['cdn']}{path}"}
        if path == "/api/repos/create":
            self.private = self.private if self.is_there else json.loads(body).get("private") or (
                json.loads(body).get("visibility") == "private")  # fmt: skip
            url = f"http://127.0.0.1:{self.ports['hub']}/{REPO}"
            return (409, {"error": "it is there", "url": url}) if self.is_there else (200, {"url": url})
        if path == f"/api/models/{REPO}":
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {"id": REPO, "private": self.private, "downloads": 0, "likes": 0, "tags": [],
                         "siblings": siblings, "sha": "0" * 40}  # fmt: skip
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if "/preupload/" in path:
            files = [{"path": each["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                     for each in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if path.endswith("/objects/batch"):
            objects = [{**each, "actions": {
                "upload": {"href": f"http://127.0.0.1:{self.ports['cdn']}/{each['oid']}"},
                "verify": {"href": f"http://127.0.0.1:{self.ports[self.verify_at]}/verify"},
            }} for each in json.loads(body)["objects"]]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        if server == "cdn":
            self.stored[path[1:]] = body
            return 200, {}
        if "/commit/" in path:
            self.commit = [json.loads(line) for line in body.splitlines()]
            return 200, {"commitUrl": f"https://huggingface.co/{REPO}/commit/1", "commitOid": "1" * 40}
        return (200, {}) if path == "/verify" else (404, {"error": path})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        fake, name = self.server.fake, self.server.name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        headers = {key.lower(): value for key, value in self.headers.items()}
        fake.requests.append((name, self.command, path, headers, body))
        status, answer = fake.answer(name, self.command, path, body)
        location = answer.pop("Location", None)
        content = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Location": location, "Content-Type": "application/json",
                           "Content-Length": str(len(content))}.items():  # fmt: skip
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    fake, servers = FakeHub(), []
    for name in ("hub", "cdn"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.fake, server.name, server.daemon_threads = fake, name, True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        fake.ports[name] = server.server_address[1]
        servers.append(server)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{fake.ports['hub']}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.setattr(constants, name, False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # else large files take another protocol
    yield fake
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(publication, *words, **options):
    with pytest.raises(HubError) as caught:
        publish(publication, **{"private": True, **options})
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text
    for word in words:
        assert word in text, text


# --- sending ----------------------------------------------------------------------------------------------------------


def test_one_commit_with_file_and_card(hub, path):
    publication = prepare(path, REPO)
    assert publish(publication, private=True).endswith(f"/{REPO}/commit/1")
    content = path.read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    assert hub.stored == {oid: content} and hub.private
    header, *entries = hub.commit
    assert header["value"]["summary"] == f"Add {NAME}"
    by_path = {entry["value"]["path"]: entry["value"] for entry in entries}
    assert set(by_path) == {NAME, "README.md"} and by_path[NAME]["oid"] == oid
    assert base64.b64decode(by_path["README.md"]["content"]).decode() == publication.card


def test_a_card_that_is_there_stays_unless_told(hub, path):
    hub.is_there, hub.files = True, ["README.md"]
    publish(prepare(path, REPO), private=True)
    assert [entry["value"].get("path") for entry in hub.commit[1:]] == [NAME]
    publish(prepare(path, REPO), private=True, replace_card=True)
    assert {entry["value"].get("path") for entry in hub.commit[1:]} == {NAME, "README.md"}


def test_a_picture_goes_with_a_card_that_shows_it_and_only_then(hub, path):
    publication = prepare(path, REPO, b"jpeg")
    assert publish(publication, private=True).endswith(f"/{REPO}/commit/1")
    assert {entry["value"].get("path") for entry in hub.commit[1:]} == {NAME, "README.md", publication.picture_name}
    hub.is_there, hub.files = True, ["README.md"]
    told = publish(publication, private=True)
    assert [entry["value"].get("path") for entry in hub.commit[1:]] == [NAME]
    assert told.endswith("the card that was there stays, without the picture: switch replace_card on to show it")


def test_a_public_repository_is_not_mistaken_for_a_private_one(hub, path):
    hub.is_there, hub.private = True, False
    refusal(prepare(path, REPO), "owner/repo is there and public; switch private off")
    assert hub.stored == {} and hub.commit is None
    publish(prepare(path, REPO), private=False)
    assert hub.commit is not None


def test_the_token_goes_to_the_endpoint_only(hub, path):
    publish(prepare(path, REPO), private=True)
    assert {headers.get("authorization") for server, *_, headers, _ in hub.requests if server == "hub"} == {
        f"Bearer {TOKEN}"
    }
    assert {server for server, *_ in hub.requests} == {"hub", "cdn"}
    assert not [request for request in hub.requests if request[0] == "cdn" and TOKEN in str(request)]
    assert not [request for request in hub.requests if TOKEN.encode() in request[4]]


@pytest.mark.parametrize("where", ["/api/repos/create", f"/api/models/{REPO}", f"/api/models/{REPO}/commit/main"])
def test_a_redirect_takes_no_token_along(hub, path, where):
    hub.redirect = where
    publish_anyway(prepare(path, REPO))
    assert [request for request in hub.requests if request[0] == "cdn" and request[2] == where], "it was followed"
    assert not [request for request in hub.requests if request[0] == "cdn" and TOKEN in str(request)]


def test_an_upload_that_is_to_be_verified_elsewhere_takes_no_token_along(hub, path):
    hub.verify_at = "cdn"
    publish_anyway(prepare(path, REPO))
    assert not [request for request in hub.requests if request[0] == "cdn" and TOKEN in str(request)]


def publish_anyway(publication):
    try:
        publish(publication, private=True)
    except HubError as error:
        assert TOKEN not in str(error)


def test_the_client_is_left_as_it_was(hub, path):
    from huggingface_hub.utils import get_session

    get_session().auth, before = None, get_session().auth
    hub.refuse = {"/api/repos/create": (500, {"error": "down"})}
    refusal(prepare(path, REPO), "owner/repo could not be published, run again")
    assert get_session().auth is None
    get_session().auth = before


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "log in with a token that may write there"), (403, "log in with a token"), (404, "check owner and name"),
     (500, "run again")],
)  # fmt: skip
def test_what_the_hub_refuses(hub, path, status, words):
    hub.refuse = {
        "/api/repos/create": (status, {"error": "no\nway"}),
        f"/api/models/{REPO}": (status, {"error": "no\nway"}),
    }
    refusal(prepare(path, REPO), "owner/repo could not be published", words)
    assert hub.stored == {} and hub.commit is None


def test_without_a_login_nothing_is_asked(hub, path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refusal(prepare(path, REPO), "nobody is logged in at http://127.0.0.1", "hf auth login", "HF_TOKEN")
    assert hub.requests == []


def test_offline_nothing_is_asked(hub, path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refusal(prepare(path, REPO), "HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_mirror_over_plain_http_gets_no_token(hub, path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.test")
    refusal(prepare(path, REPO), "nobody is logged in at http://mirror.test")


def test_nobody_there(hub, path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    refusal(prepare(path, REPO), "owner/repo could not be published, run again")
