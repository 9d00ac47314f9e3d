"""The network half of `hub.py`: requests to the Hub, and a partial file that grows until it is what the Hub stated.

Bytes are streamed with `requests`, because `hf_hub_download` (read at 2.4) checks no sha256, deletes what a stopped
download had, and lets a mirror that redirects to the Hub carry the token along, while the HTTP client it could lend
changed twice between 0.23 and 2.4; addresses, header names, the token and the model card come from `huggingface_hub`.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urljoin

T = TypeVar("T")
log = logging.getLogger("linearize")
CHUNK = 256 * 2**10
MAX_REDIRECTS = 5
MAX_NAME = 180
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


class HubError(ValueError):
    """A file cannot be had; the message is one sentence that says why and what would work."""


class Cut(Exception):
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
        if (length := len(str(self).replace("/", "--"))) > MAX_NAME:
            raise ValueError(f"a Hub file has at most {MAX_NAME} characters, a '/' counted twice, got {length}")

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}" + ("" if self.revision == "main" else f"@{self.revision}")


def _is_safe(path: str) -> bool:
    return ".." not in path and all(PART.fullmatch(part) for part in path.split("/"))


class Watch:
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


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn what the disk says while `path` is written into a sentence."""
    try:
        yield
    except TimeoutError:  # filelock's answer, not the disk's
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise HubError(f"the disk of {path.parent} is full; free space there, then {remedy}") from error
        raise HubError(f"cannot write {path} ({error.strerror or error}); {remedy}") from error


@dataclass(frozen=True, slots=True)
class Remote:
    """What the Hub says of a file: the address of this very commit, and a checksum (sha256, or git's own of 40)."""

    url: str
    commit: str
    checksum: str
    size: int


def _origin(url: str) -> tuple[str, str, int]:
    from urllib3.util import parse_url  # what `requests` connects by: another parser could be led to another host

    try:
        parts = parse_url(url)
        return parts.scheme or "", parts.host or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise HubError(f"cannot read the address {url!r}; check HF_ENDPOINT") from None


class Hub:
    """Requests to the endpoint; its token goes to its own origin only, over https or on this machine."""

    def __init__(self) -> None:
        import requests
        from huggingface_hub import constants, get_token

        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        scheme, host, _ = _origin(self.endpoint)
        if scheme not in ("http", "https") or not host or "@" in self.endpoint:
            raise HubError(
                "HF_ENDPOINT must be an address such as https://host without a password; correct or unset it"
            )
        may_log_in = (scheme == "https" or host in LOCAL_HOSTS) and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
        self.token = get_token() if may_log_in else None
        self._session = requests.Session()
        self._session.auth = lambda request: request  # else a password in .netrc would be sent along

    def close(self) -> None:
        self._session.close()

    def is_own(self, url: str) -> bool:
        """Return whether an address is on the endpoint's own origin, which may have the token."""
        return _origin(url) == _origin(self.endpoint)

    def send(
        self, method: str, url: str, file: HubFile, timeout: float, *, offset: int = 0, until: str | None = None
    ) -> Any:
        """Return the response behind all redirects, or the first that has the header `until`.

        Raises:
            Cut: no connection, or a server that may answer later.
            HubError: an answer that trying again would not change.
        """
        import requests

        is_own = True
        for _ in range(MAX_REDIRECTS + 1):
            is_own = is_own and self.is_own(url)  # once away, no token on the way back either
            headers = {"User-Agent": "linearize", "Accept-Encoding": "identity"}
            headers |= {"Range": f"bytes={offset}-"} if offset else {}
            headers |= {"Authorization": f"Bearer {self.token}"} if is_own and self.token else {}
            try:
                response = self._session.request(
                    method, url, headers=headers, timeout=timeout, stream=True, allow_redirects=False
                )
            except requests.RequestException as error:
                raise Cut(f"cannot reach {_origin(url)[1]} ({type(error).__name__})") from error
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
            return Cut(f"{_origin(response.url)[1]} answered {status}")
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

    def inspect(self, file: HubFile) -> Remote:
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
        return Remote(pinned, commit, checksum, int(length))

    def read_licence(self, file: HubFile, commit: str) -> str:
        """Return the licence on the model card, asked for without the token; empty where there is none."""
        from huggingface_hub import HfApi, constants

        try:
            api = HfApi(endpoint=self.endpoint, token=False)
            card = api.model_info(file.repo, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT).card_data
        except Exception as error:  # a courtesy: the file is here and verified
            log.debug("no model card for %s: %s", file, error)
            return ""
        licence = getattr(card, "license", None)
        licence = getattr(card, "license_name", None) if licence == "other" else licence
        return licence[:100] if isinstance(licence, str) and licence.isprintable() else ""


class Partial:
    """The file as far as it has come, hashed as it grows; `furthest` does not fall when it starts anew."""

    def __init__(self, stream: IO[bytes], path: Path, remote: Remote) -> None:
        self.stream, self.path, self.remote = stream, path, remote
        self.furthest = 0
        self.fault = ""
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

    def load(self, watch: Watch) -> None:
        """Hash what an earlier call left."""
        self.stream.seek(0)
        while chunk := self.stream.read(CHUNK):
            self._count(chunk)
            watch.tick(min(self.size, self.remote.size), self.remote.size)

    def append(self, chunk: bytes) -> None:
        with writing(self.path, f"run again, which goes on from the {self.size} bytes kept in {self.path.name}"):
            _write(self.stream, chunk)
        self._count(chunk)

    def check_space(self) -> None:
        """Raise HubError if what is missing does not fit on the disk."""
        folder, missing = self.path.parent, self.remote.size - self.size
        if missing > (free := shutil.disk_usage(folder).free):
            raise HubError(
                f"the disk of {folder} has {free} bytes free where {missing} are still needed; free space there, then "
                f"run again, which goes on from the {self.size} bytes kept in {self.path.name}"
            )

    def find_fault(self) -> str:
        """Return what differs from what the Hub stated, empty if nothing."""
        if self.fault:
            return self.fault
        if self.size != self.remote.size:
            return f"has {self.size} bytes or more"
        digest = self.sha256 if len(self.remote.checksum) == 64 else self.git
        return "" if digest.hexdigest() == self.remote.checksum else "has another checksum"


def _write(stream: IO[bytes], chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[stream.write(view) :]


def persist(
    action: Callable[[], T], watch: Watch, delays: Sequence[float], furthest: Callable[[], int] = lambda: 0
) -> T:
    """Return what `action` does once it is not cut; a try that came further than all before starts the count anew."""
    failures = 0
    while True:
        before = furthest()
        try:
            return action()
        except Cut as cut:
            failures = 1 if furthest() > before else failures + 1
            if failures > len(delays):
                raise
            log.info("trying again: %s", cut)
            watch.sleep(delays[failures - 1])


def append_missing(hub: Hub, file: HubFile, partial: Partial, watch: Watch) -> None:
    """Append what is missing; on return either all of it is there or `partial.find_fault` says what is wrong."""
    from huggingface_hub import constants

    remote = partial.remote
    if partial.size >= remote.size:
        return
    response = hub.send("GET", remote.url, file, constants.HF_HUB_DOWNLOAD_TIMEOUT, offset=partial.size)
    with contextlib.closing(response):
        is_part = response.status_code == 206
        if response.status_code == 416 or (
            is_part and not response.headers.get("Content-Range", "").startswith(f"bytes {partial.size}-")
        ):
            partial.restart()
            raise Cut(f"{_origin(response.url)[1]} sent another part than the one asked for")
        stated = response.headers.get("Content-Range", "").rpartition("/")[2] if is_part else ""
        stated = stated or response.headers.get("Content-Length", "")
        if stated.isdecimal() and int(stated) != remote.size:
            partial.fault = f"has {stated} bytes"
            return
        if partial.size and not is_part:  # the server sends all of it again
            partial.restart()
        for chunk in _chunks(response):
            partial.append(chunk)
            watch.tick(min(partial.size, remote.size), remote.size)
            if partial.size > remote.size:
                return
    if partial.size < remote.size:
        raise Cut("the connection ended early")


def _chunks(response: Any) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(CHUNK)
    except (requests.RequestException, OSError) as error:
        raise Cut(f"the connection to {_origin(response.url)[1]} was cut ({type(error).__name__})") from error
