"""Files of the Hugging Face Hub in a model folder: fetched only when permitted, verified, recorded beside the file.

Nothing here opens the files it fetches, keeps a shared cache or writes to the Hub, and nothing asks for a token.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic_file import whole_file
from ..checks import json_or_none
from ..shown import one_line
from .partial import CHUNK, Partial, Watch, append_missing, persist, writing
from .transfer import Cut, Hub, HubError, HubFile, without_address

log = logging.getLogger("linearize")
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try that follows one without a new byte
UNKNOWN_LICENCE = "not stated on the model card"
CLEAR_LICENCE = (
    "not stated beside the file; the licence of the base model holds, the FLUX.1 [dev] Non-Commercial License"
)


def parse_hub_file(text: str) -> HubFile:
    """Return the file that `owner/repo/path/to/file.safetensors[@revision]` or its address on the Hub names.

    Raises:
        ValueError: as `HubFile`, or the text is another address, has a backslash, no file or an empty revision.
    """
    text = without_address(text)
    path, at, revision = text.strip().partition("@")
    parts = path.split("/", 2)
    if ":" in text or "\\" in text or len(parts) != 3:
        raise ValueError(
            f"write a Hub file as owner/repo/file.safetensors or owner/repo/file.safetensors@revision, with forward "
            f"slashes, or paste its address on the Hub, got {text!r}"
        )
    if at and not revision:
        raise ValueError(f"write a branch, tag or commit after the '@', or leave it out, got {text!r}")
    return HubFile(f"{parts[0]}/{parts[1]}", parts[2], revision if at else "main")


# CLEAR's published weights, by their own names; the name tells the window, see `clear_weights.published_radius`
CLEAR_FILES: dict[str, HubFile] = {
    name: HubFile("Huage001/CLEAR", f"{name}.safetensors")
    for name in (
        "clear_local_32",
        "clear_local_16",
        "clear_local_8",
        "clear_local_16_down_4",
        "clear_local_8_down_4",
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
    if file in CLEAR_FILES.values():
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
    watch = Watch(progress, should_stop)
    present = _find_present(path, file, watch)
    if present is not None:
        return present
    by_hand = f"put the file at {path} by hand"
    if not allow_download:
        raise HubError(f"{file} is not in {models_folder}; switch on allow_download to fetch it, or {by_hand}")
    if is_offline():
        raise HubError(f"{file} is not here and HF_HUB_OFFLINE is set; unset it, or {by_hand}")
    with writing(path, "make its folder writable"):
        models_folder.mkdir(parents=True, exist_ok=True)
    with _locked(path, watch):
        present = _find_present(path, file, watch)  # another call may have fetched it meanwhile
        if present is not None:
            return present
        with contextlib.closing(Hub()) as hub:
            return _fetch(hub, file, path, watch, delays)


def is_offline() -> bool:
    """Return whether the user's settings keep everything away from the Hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextlib.contextmanager
def _locked(path: Path, watch: Watch) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")  # held through the operating system, so a killed process leaves none behind
    said = False
    while not lock.is_locked:
        watch.stop()
        try:
            with writing(path, "make its folder writable"):
                lock.acquire(timeout=0.1, poll_interval=0.02)
        except Timeout:
            if not said:
                log.info("waiting for another download of %s", path.name)
            said = True
    try:
        yield
    finally:
        lock.release()


def _find_present(path: Path, file: HubFile, watch: Watch) -> Download | None:
    if not path.is_file():
        return None
    size, mtime_ns = path.stat().st_size, path.stat().st_mtime_ns
    record = _read_record(path)
    if record is None:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                watch.tick(stream.tell(), size)
        found = Download(path, "", digest.hexdigest(), size, _licence_without_card(file))
        with contextlib.suppress(OSError):  # a folder that cannot be written only costs the hash next time
            _write_record(found, file, mtime_ns)
        return found
    if record["size"] != size:
        raise HubError(
            f"{path} has {size} bytes where its record says {record['size']}; delete {path.name}.json to take the file "
            "as it is, or delete both to fetch it again"
        )
    if (record["repo"], record["file"], record["revision"]) != (file.repo, file.file, file.revision):
        raise HubError(
            f"{path} was fetched for another file than {file}; move it and its .json elsewhere to fetch this"
        )
    return Download(path, record["commit"], record["sha256"], size, record["licence"])


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def recorded_sha256(path: Path) -> str | None:
    """Return the sha256 noted when a file was fetched from the Hub, None for another file, or one changed since."""
    record, found = _read_record(path), path.stat()
    if record is None or (record["size"], record.get("mtime_ns")) != (found.st_size, found.st_mtime_ns):
        return None
    return record["sha256"]


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json_or_none(_record_path(path).read_bytes())
    except OSError:
        return None
    texts = ("repo", "file", "revision", "commit", "sha256", "licence")
    whole = isinstance(record, dict) and isinstance(record.get("size"), int)
    return record if whole and all(isinstance(record.get(key), str) for key in texts) else None


def _write_record(found: Download, file: HubFile, mtime_ns: int) -> None:
    record = asdict(file) | asdict(found) | {"mtime_ns": mtime_ns}
    del record["path"]
    with whole_file(_record_path(found.path)) as stream:
        stream.write((json.dumps(record, indent=2) + "\n").encode())


def _licence_without_card(file: HubFile) -> str:
    return CLEAR_LICENCE if file in CLEAR_FILES.values() else UNKNOWN_LICENCE


def _fetch(hub: Hub, file: HubFile, path: Path, watch: Watch, delays: Sequence[float]) -> Download:
    try:
        remote = persist(lambda: hub.inspect(file), watch, delays[:2])
    except Cut as cut:
        raise HubError(f"{cut}; check the connection and HF_ENDPOINT, or put {file} at {path} by hand") from cut
    unfinished = path.with_name(f"{path.name}.{remote.checksum[:16]}.partial")
    for older in path.parent.glob(f"{path.name}.*.partial"):
        if older != unfinished:  # of content that the revision no longer means
            with contextlib.suppress(OSError):
                older.unlink()
    log.info("fetching %s (%.1f MB) to %s", file, remote.size / 1e6, path)
    with writing(path, "make its folder writable"):
        stream = unfinished.open("a+b", buffering=0)
    with stream:
        partial = Partial(stream, unfinished, remote)
        partial.load(watch)
        partial.check_space()
        try:
            persist(lambda: append_missing(hub, file, partial, watch), watch, delays, lambda: partial.furthest)
        except Cut as cut:
            raise HubError(
                f"{cut} and {partial.size} of {remote.size} bytes of {file} are here, in {unfinished.name}; run again "
                "to go on from there"
            ) from cut
        fault = partial.find_fault()
    if fault:
        unfinished.unlink(missing_ok=True)
        raise HubError(
            f"what came for {file} {fault} where the Hub states {remote.size} bytes of {remote.checksum[:16]}..., so "
            "it was removed; run again, or use another HF_ENDPOINT"
        )
    licence = hub.read_licence(file, remote.commit) or _licence_without_card(file)
    found = Download(path, remote.commit, partial.sha256.hexdigest(), remote.size, licence)
    with writing(path, f"run again, which takes {unfinished.name}"):
        _write_record(found, file, unfinished.stat().st_mtime_ns)
        os.replace(unfinished, path)
    log.info("fetched %s, commit %s, licence: %s", path.name, remote.commit[:12], one_line(licence, 200))
    return found
