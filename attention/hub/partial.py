"""A file of the Hub as far as it has come: a partial file that grows, over cuts and restarts, until it is whole.

The bytes are streamed here and not by `http_get` of `huggingface_hub` (read at 0.36 and 2.4), which takes whatever part
a server sends for the one it asked for, writes on after the size that was stated, repeats for ever where a server
without ranges breaks off, waits as long as a server says with no way to cancel, and loses up to 10 MB at a cut.
`hf_hub_download` checks no sha256 and deletes what a stopped download had. What is asked of the Hub is in
`transfer.py`.
"""

import contextlib
import errno
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from .transfer import Cut, Hub, HubError, HubFile, Remote, host_name

T = TypeVar("T")
log = logging.getLogger("linearize")
CHUNK = 256 * 2**10


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
            raise Cut(f"{host_name(response.url)} sent another part than the one asked for")
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
        raise Cut(f"the connection to {host_name(response.url)} was cut ({type(error).__name__})") from error
