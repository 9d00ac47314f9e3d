"""What is asked of the Hub: a file's name, checksum and licence, and the requests that bring its bytes.

Addresses, header names, the token and the model card come from `huggingface_hub`; the requests are made with
`requests`, which ComfyUI needs too, for two reasons. `get_hf_file_metadata` (read at 2.4) follows a redirect to the Hub
with the token, so a mirror's token would leave the mirror. And versions 0.23 to 2.4 of `huggingface_hub`, all of which
ComfyUI may have, bring three HTTP clients. What becomes of the bytes is in `partial.py`.
"""

import logging
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

log = logging.getLogger("linearize")
MAX_REDIRECTS = 5
MAX_NAME = 180
HUB = "https://huggingface.co"
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
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


def without_address(text: str) -> str:
    """Return an address of the Hub in the form `owner/repo[/file][@revision]`; other texts as they are.

    Read are pages of a repository, of a folder and of a file, and a file's download address.

    Raises:
        ValueError: it is an address of something else.
    """
    text = text.strip()
    if not re.match(r"(https?://|hf\.co/|huggingface\.co/)", text, re.IGNORECASE):
        return text
    parts = urlsplit(text if "//" in text else f"https://{text}")
    own = urlsplit(os.environ.get("HF_ENDPOINT") or HUB).hostname
    if parts.hostname not in {*HUB_HOSTS, own}:
        raise ValueError(f"{parts.hostname or text!r} is not the Hub; write owner/repo, or paste an address of the Hub")
    # split first: a revision such as refs%2Fpr%2F1 holds slashes of its own
    owner, repo, kind, revision, *path = [*map(unquote, parts.path.strip("/").split("/")), *[""] * 4]
    path = [each for each in path if each]
    if not repo or kind not in ("", "blob", "resolve", "tree", "discussions", "commits"):
        raise ValueError(f"that address names no repository of models: {text!r}; write owner/repo")
    file = "/".join(path) if kind in ("blob", "resolve") else ""
    if not file:
        return f"{owner}/{repo}"
    return f"{owner}/{repo}/{file}" + ("" if revision in ("", "main") else f"@{revision}")


def _is_safe(path: str) -> bool:
    return ".." not in path and all(PART.fullmatch(part) for part in path.split("/"))


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


def host_name(url: str) -> str:
    """Return the host of an address, for messages."""
    return _origin(url)[1]


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
                raise Cut(f"cannot reach {host_name(url)} ({type(error).__name__})") from error
            if not response.is_redirect or (until is not None and until in response.headers):
                if response.status_code >= 400 and response.status_code != 416:
                    response.close()
                    raise self._explain(response, file, is_own)
                return response
            response.close()
            target = urljoin(url, response.headers["Location"])
            if _origin(target)[0] not in ("https", _origin(url)[0]):
                raise HubError(f"{host_name(url)} redirects to an address that is not https; use another HF_ENDPOINT")
            url = target
        raise HubError(f"{self.endpoint} redirects more than {MAX_REDIRECTS} times for {file}; use another HF_ENDPOINT")

    def _explain(self, response: Any, file: HubFile, is_own: bool) -> Exception:
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{file.repo}"
        log_in = "log in with the Hub's own login (hf auth login), then run again"
        # a file server refuses when the address the Hub gave has expired, and the next try gets a new one
        if status in (408, 425, 429) or status >= 500 or not (is_own or code):
            return Cut(f"{host_name(response.url)} answered {status}")
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
