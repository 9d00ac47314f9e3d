"""Fetch one `.safetensors` file of the Hugging Face Hub into a model folder: permitted, resumed, verified, recorded.

Bytes are streamed with `requests`, because `hf_hub_download` (read at 2.4) checks no sha256, deletes what a stopped
download had, and lets a mirror that redirects to the Hub carry the token along, while the HTTP client it could lend
changed twice between 0.23 and 2.4; addresses, header names, the token and the model card come from `huggingface_hub`.

Nothing here opens the files it fetches, keeps a shared cache or writes to the Hub, and nothing asks for a token.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urljoin, urlsplit

T = TypeVar("T")
LOG = logging.getLogger(__name__)
CHUNK = 256 * 2**10
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try that follows one without a new byte
MAX_REDIRECTS = 5
MAX_NAME = 180
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
UNKNOWN_LICENCE = "not stated on the model card"
CLEAR_LICENCE = (
    "not stated beside the file; weights made from FLUX.1-dev follow its licence, the FLUX.1 [dev] Non-Commercial License"
)


class HubError(RuntimeError):
    """A file cannot be had; the message is one sentence that says why and what would work."""


class _Cut(Exception):
    """A failure that may pass: no connection, a broken one, a busy server."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of one Hub repository; `str` gives the form that `parse_hub_file` reads.

    Args:
        repo: "owner/name".
        file: its path in the repository, a `.safetensors` file.
        revision: branch, tag or commit.

    Raises:
        ValueError: a part has other characters than letters, digits and `. _ + -` (`/` between folders), a part starts
            with a dot or a dash, `..` occurs, the file is of another kind, or all together exceed 180 characters.
    """

    repo: str
    file: str
    revision: str = "main"

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1 or "--" in self.repo or not _is_safe(self.repo):
            raise ValueError(f"a Hub repository is owner/name in letters, digits, '.', '_' and '-', got {self.repo!r}")
        if not self.file.endswith(".safetensors"):
            raise ValueError(f"only .safetensors files are fetched from the Hub, got {self.file!r}")
        if not _is_safe(self.file):
            raise ValueError(
                f"a file in a Hub repository is written folder/file.safetensors, with no '..', space or '\\', "
                f"got {self.file!r}"
            )
        if not _is_safe(self.revision):
            raise ValueError(f"a revision is a branch, tag or commit such as main, got {self.revision!r}")
        if len(str(self)) > MAX_NAME:
            raise ValueError(f"a Hub file has at most {MAX_NAME} characters in all, got {len(str(self))}")

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}" + ("" if self.revision == "main" else f"@{self.revision}")


def _is_safe(path: str) -> bool:
    return ".." not in path and all(PART.fullmatch(part) for part in path.split("/"))


def parse_hub_file(text: str) -> HubFile:
    """Return the file that `owner/repo/path/to/file.safetensors[@revision]` names.

    Raises:
        ValueError: as `HubFile`, or the text is an address, has a backslash, no file or an empty revision.
    """
    path, at, revision = text.strip().partition("@")
    parts = path.split("/", 2)
    if ":" in text or "\\" in text or len(parts) != 3:
        raise ValueError(
            f"write a Hub file as owner/repo/file.safetensors or owner/repo/file.safetensors@revision, with forward "
            f"slashes and no address before it, got {text!r}"
        )
    if at and not revision:
        raise ValueError(f"write a branch, tag or commit after the '@', or leave it out, got {text!r}")
    return HubFile(f"{parts[0]}/{parts[1]}", parts[2], revision if at else "main")


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A published file whose window is known by its name; `licence` is what holds where the model card says nothing."""

    file: HubFile
    radius: int
    down_factor: int = 1
    licence: str = CLEAR_LICENCE


CLEAR_FILES: dict[str, KnownFile] = {
    name: KnownFile(HubFile("Huage001/CLEAR", f"{name}.safetensors"), radius, down_factor)
    for name, radius, down_factor in (
        ("clear_local_32", 32, 1),
        ("clear_local_16", 16, 1),
        ("clear_local_8", 8, 1),
        ("clear_local_16_down_4", 16, 4),
        ("clear_local_8_down_4", 8, 4),
    )
}


@dataclass(frozen=True, slots=True)
class Download:
    """A file that is complete on this machine.

    Args:
        path: where it lies.
        commit: 40 hex digits, what the revision meant when it was fetched; empty for a file put there by hand.
        sha256: of its content, 64 hex digits.
        size: in bytes.
        licence: as the model card says it, else what is known, else a text that says it is not stated.
    """

    path: Path
    commit: str
    sha256: str
    size: int
    licence: str


def local_path(models_folder: Path, file: HubFile) -> Path:
    """Return where `file` is kept: directly in `models_folder`, CLEAR's files under their own name.

    Other files are named `owner--repo--folder--file.safetensors`, with `@revision` after the repository unless main.
    """
    if any(file == known.file for known in CLEAR_FILES.values()):
        return models_folder / file.file
    revision = "" if file.revision == "main" else f"@{file.revision}"
    return models_folder / f"{file.repo}{revision}/{file.file}".replace("/", "--")


def download(
    file: HubFile,
    models_folder: Path,
    *,
    allow_download: bool,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], None] | None = None,
    delays: Sequence[float] = RETRY_DELAYS,
) -> Download:
    """Return `file` complete in `models_folder`, fetched only if it is not there.

    A file that lies there is taken without any request: its size must be that of the record beside it
    (`<file>.json`: repo, file, revision, commit, sha256, size, licence); one without a record was put there by hand and
    is hashed once. A fetched file is compared with the size and the checksum that the Hub states before it gets its
    name; until then it is `<file>.<checksum>.partial`, which the next call resumes. A second call for the same file
    waits for the first, in this process or another.

    Args:
        file: what to fetch.
        models_folder: made if missing.
        allow_download: whether a person permitted the network; choosing one of `CLEAR_FILES` is such a permission.
        progress: gets (bytes so far, bytes in all) after each chunk; never falls, ends at the total.
        should_stop: called between chunks and while waiting; what it raises passes through, the partial file stays.
        delays: seconds before each further try; tries that brought new bytes are not counted.

    Raises:
        HubError: not permitted, offline, no access, no such file, wrong content (then removed), disk full or
            connection lost (then the partial file stays).
    """
    path = local_path(models_folder, file)
    watch = _Watch(progress, should_stop)
    present = _find_present(path, file, watch)
    if present is not None:
        return present
    by_hand = f"put the file at {path} by hand"
    if not allow_download:
        raise HubError(f"{file} is not in {models_folder}; switch on allow_download to fetch it, or {by_hand}")
    if _is_offline():
        raise HubError(f"{file} is not here and HF_HUB_OFFLINE is set; unset it, or {by_hand}")
    with _writing(path, "make its folder writable"):
        models_folder.mkdir(parents=True, exist_ok=True)
    with _locked(path, watch):
        present = _find_present(path, file, watch)  # another call may have fetched it meanwhile
        return present if present is not None else _fetch(file, path, watch, delays)


class _Watch:
    """The caller's progress and stop functions."""

    def __init__(self, progress: Callable[[int, int], None] | None, should_stop: Callable[[], None] | None) -> None:
        self.stop = should_stop or (lambda: None)
        self._progress = progress or (lambda done, total: None)
        self._highest = 0

    def tick(self, done: int, total: int) -> None:
        self.stop()
        self._highest = max(self._highest, done)
        self._progress(self._highest, total)

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.stop()
            time.sleep(min(left, 0.1))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextlib.contextmanager
def _locked(path: Path, watch: _Watch) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")  # held through the operating system, so a killed process leaves none behind
    said = False
    while not lock.is_locked:
        watch.stop()
        try:
            with _writing(path, "make its folder writable"):
                lock.acquire(timeout=0.1, poll_interval=0.02)
        except Timeout:
            if not said:
                LOG.info("Linearize waits for another download of %s", path.name)
            said = True
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn what the disk says while `path` is written into a sentence."""
    try:
        yield
    except TimeoutError:  # filelock's answer, not the disk's
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise HubError(f"the disk of {path.parent} is full; free space there, then {remedy}") from error
        raise HubError(f"cannot write {path} ({error.strerror or error}); {remedy}") from error


# --- what lies in the folder ----------------------------------------------------------------------------------------


def _find_present(path: Path, file: HubFile, watch: _Watch) -> Download | None:
    if not path.is_file():
        return None
    size = path.stat().st_size
    record = _read_record(path)
    if record is None:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                watch.tick(stream.tell(), size)
        found = Download(path, "", digest.hexdigest(), size, _licence_without_card(file))
        with contextlib.suppress(OSError):  # a folder that cannot be written only costs the hash next time
            _write_record(found, file)
        return found
    if record["size"] != size:
        raise HubError(
            f"{path} has {size} bytes where its record says {record['size']}; delete {path.name}.json to take the file "
            "as it is, or delete both to fetch it again"
        )
    if (record["repo"], record["file"], record["revision"]) != (file.repo, file.file, file.revision):
        raise HubError(f"{path} was fetched for another file than {file}; move it and its .json elsewhere to fetch this")
    return Download(path, record["commit"], record["sha256"], size, record["licence"])


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    texts = ("repo", "file", "revision", "commit", "sha256", "licence")
    whole = isinstance(record, dict) and isinstance(record.get("size"), int)
    return record if whole and all(isinstance(record.get(key), str) for key in texts) else None


def _write_record(found: Download, file: HubFile) -> None:
    record = asdict(file) | asdict(found)
    del record["path"]
    unfinished = _record_path(found.path).with_suffix(".json.partial")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, _record_path(found.path))


def _licence_without_card(file: HubFile) -> str:
    return next((known.licence for known in CLEAR_FILES.values() if known.file == file), UNKNOWN_LICENCE)


# --- what lies on the Hub -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Remote:
    """What the Hub says of a file: the address of this very commit, and a checksum (sha256, or git's own of 40)."""

    url: str
    commit: str
    checksum: str
    size: int


def _origin(url: str) -> tuple[str, str, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise HubError(f"cannot read the address {url!r}; check HF_ENDPOINT") from None


class _Hub:
    """Requests to the endpoint; its token goes to its own origin only, over https or on this machine."""

    def __init__(self) -> None:
        import requests
        from huggingface_hub import constants, get_token

        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        scheme, host, _ = _origin(self.endpoint)
        if scheme not in ("http", "https") or not host or "@" in self.endpoint:
            raise HubError("HF_ENDPOINT must be an address such as https://host without a password; correct or unset it")
        may_log_in = (scheme == "https" or host in LOCAL_HOSTS) and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
        self._token = get_token() if may_log_in else None
        self._session = requests.Session()
        self._session.auth = lambda request: request  # else a password in .netrc would be sent along

    def send(
        self, method: str, url: str, file: HubFile, timeout: float, *, offset: int = 0, until: str | None = None
    ) -> Any:
        """Return the response behind all redirects, or the first that has the header `until`.

        Raises:
            _Cut: no connection, or a server that may answer later.
            HubError: an answer that trying again would not change.
        """
        import requests

        is_own = True
        for _ in range(MAX_REDIRECTS + 1):
            is_own = is_own and _origin(url) == _origin(self.endpoint)  # once away, no token on the way back either
            headers = {"User-Agent": "linearize", "Accept-Encoding": "identity"}
            headers |= {"Range": f"bytes={offset}-"} if offset else {}
            headers |= {"Authorization": f"Bearer {self._token}"} if is_own and self._token else {}
            try:
                response = self._session.request(
                    method, url, headers=headers, timeout=timeout, stream=True, allow_redirects=False
                )
            except requests.RequestException as error:
                raise _Cut(f"cannot reach {_origin(url)[1]} ({type(error).__name__})") from error
            if not response.is_redirect or (until is not None and until in response.headers):
                if response.status_code >= 400 and response.status_code != 416:
                    response.close()
                    raise self._explain(response, file, is_own)
                return response
            response.close()
            target = urljoin(url, response.headers["Location"])
            if _origin(target)[0] not in ("https", _origin(url)[0]):
                raise HubError(f"{_origin(url)[1]} redirects to an address that is not https; use another HF_ENDPOINT")
            url = target
        raise HubError(f"{self.endpoint} redirects more than {MAX_REDIRECTS} times for {file}; use another HF_ENDPOINT")

    def _explain(self, response: Any, file: HubFile, is_own: bool) -> Exception:
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{file.repo}"
        log_in = "log in with the Hub's own login (hf auth login), then run again"
        # a file server refuses when the address the Hub gave has expired, and the next try gets a new one
        if status in (408, 425, 429) or status >= 500 or not (is_own or code):
            return _Cut(f"{_origin(response.url)[1]} answered {status}")
        if code == "GatedRepo" or status == 403:
            return HubError(f"{file} is gated ({status}); accept the licence at {page} and {log_in}")
        if code == "RevisionNotFound":
            return HubError(f"{file.repo} has no revision {file.revision!r}; choose one of those at {page}")
        if code == "EntryNotFound":
            return HubError(
                f"{file.repo} has no file {file.file!r} at revision {file.revision!r}; choose one of those at {page}"
            )
        if code == "RepoNotFound" or status == 401:
            return HubError(
                f"the Hub shows no repository {file.repo!r} ({status}); check the name, or if it is private or gated "
                f"accept its licence at {page} and {log_in}"
            )
        return HubError(f"{self.endpoint} answered {status} for {file}; check the name at {page}")

    def inspect(self, file: HubFile) -> _Remote:
        """Return what the Hub says of `file` now."""
        from huggingface_hub import constants, hf_hub_url

        etag, size = constants.HUGGINGFACE_HEADER_X_LINKED_ETAG, constants.HUGGINGFACE_HEADER_X_LINKED_SIZE
        url = hf_hub_url(file.repo, file.file, revision=file.revision, endpoint=self.endpoint)
        headers = self.send("HEAD", url, file, constants.HF_HUB_ETAG_TIMEOUT, until=etag).headers
        commit = headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT, "")
        checksum = headers.get(etag, headers.get("ETag", "")).removeprefix("W/").strip('"').lower()
        length = headers.get(size) or ("" if "Location" in headers else headers.get("Content-Length", ""))
        stated = re.fullmatch(r"[0-9a-f]{40}", commit) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", checksum)
        if not stated or not length.isdecimal():
            raise HubError(
                f"{self.endpoint} does not state commit, checksum and size of {file}; use an HF_ENDPOINT that passes "
                "the Hub's headers on"
            )
        pinned = hf_hub_url(file.repo, file.file, revision=commit, endpoint=self.endpoint)
        return _Remote(pinned, commit, checksum, int(length))

    def read_licence(self, file: HubFile, commit: str) -> str:
        """Return the licence on the model card, asked for without the token; empty where there is none."""
        from huggingface_hub import HfApi, constants

        try:
            api = HfApi(endpoint=self.endpoint, token=False)
            card = api.model_info(file.repo, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT).card_data
        except Exception as error:  # a courtesy: the file is here and verified
            LOG.debug("no model card for %s: %s", file, error)
            return ""
        licence = getattr(card, "license", None)
        licence = getattr(card, "license_name", None) if licence == "other" else licence
        return licence[:100] if isinstance(licence, str) and licence.isprintable() else ""


# --- from there to here ---------------------------------------------------------------------------------------------


class _Partial:
    """The file as far as it has come, hashed as it grows; `furthest` does not fall when it starts anew."""

    def __init__(self, stream: IO[bytes], path: Path, remote: _Remote) -> None:
        self.stream, self.path, self.remote = stream, path, remote
        self.furthest = 0
        self._begin()

    def _begin(self) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.git = hashlib.sha1(b"blob %d\0" % self.remote.size, usedforsecurity=False)

    def restart(self) -> None:
        self.stream.truncate(0)
        self._begin()

    def _count(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.furthest = max(self.furthest, self.size)
        self.sha256.update(chunk)
        self.git.update(chunk)

    def load(self, watch: _Watch) -> None:
        """Hash what an earlier call left."""
        self.stream.seek(0)
        while chunk := self.stream.read(CHUNK):
            self._count(chunk)
            watch.tick(min(self.size, self.remote.size), self.remote.size)

    def append(self, chunk: bytes) -> None:
        with _writing(self.path, f"run again, which goes on from the {self.size} bytes kept in {self.path.name}"):
            _write(self.stream, chunk)
        self._count(chunk)

    def find_fault(self) -> str:
        """Return what differs from what the Hub stated, empty if nothing."""
        if self.size != self.remote.size:
            return f"has {'more than ' if self.size > self.remote.size else ''}{self.size} bytes"
        digest = self.sha256 if len(self.remote.checksum) == 64 else self.git
        return "" if digest.hexdigest() == self.remote.checksum else "has another checksum"


def _write(stream: IO[bytes], chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[stream.write(view) :]


def _fetch(file: HubFile, path: Path, watch: _Watch, delays: Sequence[float]) -> Download:
    hub = _Hub()
    try:
        remote = _persist(lambda: hub.inspect(file), watch, delays[:2])
    except _Cut as cut:
        raise HubError(f"{cut}; check the connection and HF_ENDPOINT, or put {file} at {path} by hand") from cut
    unfinished = path.with_name(f"{path.name}.{remote.checksum[:16]}.partial")
    for older in path.parent.glob(f"{path.name}.*.partial"):
        if older not in (unfinished, _record_path(path).with_suffix(".json.partial")):
            older.unlink(missing_ok=True)  # of content that the revision no longer means
    LOG.info("Linearize fetches %s (%.1f MB) to %s", file, remote.size / 1e6, path)
    with _writing(path, "make its folder writable"):
        stream = unfinished.open("a+b", buffering=0)
    with stream:
        partial = _Partial(stream, unfinished, remote)
        partial.load(watch)
        _check_space(partial)
        try:
            _persist(lambda: _stream(hub, file, partial, watch), watch, delays, lambda: partial.furthest)
        except _Cut as cut:
            raise HubError(
                f"{cut} and {partial.size} of {remote.size} bytes of {file} are here, in {unfinished.name}; run again "
                "to go on from there"
            ) from cut
        fault = partial.find_fault()
    if fault:
        unfinished.unlink(missing_ok=True)
        raise HubError(
            f"what came for {file} {fault} where the Hub states {remote.size} bytes of {remote.checksum[:16]}..., so it "
            "was removed; run again, or use another HF_ENDPOINT"
        )
    licence = hub.read_licence(file, remote.commit) or _licence_without_card(file)
    found = Download(path, remote.commit, partial.sha256.hexdigest(), remote.size, licence)
    with _writing(path, f"run again, which takes {unfinished.name}"):
        _write_record(found, file)
        os.replace(unfinished, path)
    LOG.info("Linearize has %s, commit %s, licence: %s", path.name, remote.commit[:12], licence)
    return found


def _check_space(partial: _Partial) -> None:
    folder, missing = partial.path.parent, partial.remote.size - partial.size
    if missing > (free := shutil.disk_usage(folder).free):
        raise HubError(
            f"the disk of {folder} has {free} bytes free where {missing} are still needed; free space there, then run "
            f"again, which goes on from the {partial.size} bytes kept in {partial.path.name}"
        )


def _persist(
    action: Callable[[], T], watch: _Watch, delays: Sequence[float], furthest: Callable[[], int] = lambda: 0
) -> T:
    """Return what `action` does once it is not cut; a try that came further than all before starts the count anew."""
    failures = 0
    while True:
        before = furthest()
        try:
            return action()
        except _Cut as cut:
            failures = 1 if furthest() > before else failures + 1
            if failures > len(delays):
                raise
            LOG.info("Linearize tries again: %s", cut)
            watch.sleep(delays[failures - 1])


def _stream(hub: _Hub, file: HubFile, partial: _Partial, watch: _Watch) -> None:
    """Append what is missing; on return the size is right or what came is too long."""
    from huggingface_hub import constants

    remote = partial.remote
    if partial.size >= remote.size > 0:
        return
    response = hub.send("GET", remote.url, file, constants.HF_HUB_DOWNLOAD_TIMEOUT, offset=partial.size)
    with contextlib.closing(response):
        is_part = response.status_code == 206
        if response.status_code == 416 or (
            is_part and not response.headers.get("Content-Range", "").startswith(f"bytes {partial.size}-")
        ):
            partial.restart()
            raise _Cut(f"{_origin(response.url)[1]} sent another part than the one asked for")
        if partial.size and not is_part:  # the server sends all of it again
            partial.restart()
        for chunk in _chunks(response):
            partial.append(chunk)
            watch.tick(min(partial.size, remote.size), remote.size)
            if partial.size > remote.size:
                return
    if partial.size < remote.size:
        raise _Cut("the connection ended early")


def _chunks(response: Any) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(CHUNK)
    except (requests.RequestException, OSError) as error:
        raise _Cut(f"the connection to {_origin(response.url)[1]} was cut ({type(error).__name__})") from error
