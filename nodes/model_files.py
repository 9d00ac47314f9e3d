"""Files of learned attention in ComfyUI's `models/linearize` folder, and CLEAR's published ones by name.

Choosing a published file that is not there yet is the click that permits its download; nothing else is ever fetched.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import comfy.utils
import folder_paths

from ..attention.hub.download import CLEAR_FILES, HubFile, download, parse_hub_file, recorded_sha256
from ..attention.shown import one_line
from ..attention.students.tensor_file import MAX_NAME
from ..attention.words import file_size, percent, time_left
from ..patching.prompt_graph import executing
from .node_status import show_on_node

FOLDER = "linearize"
EXTENSION = ".safetensors"
HASHED_BYTES = 512 * 2**20
TELL_S = 1.0  # between texts while something is downloaded
FRESH_NS = 4 * 10**9  # some file systems tell times to 2 s
T = TypeVar("T")
PART = re.compile(r"(?![. ])[^\x00-\x1f<>:\"|?*\\/]{1,100}(?<![. ])")  # of a path, on every system
WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def register_folder() -> None:
    """Make `models/linearize` known to ComfyUI, so that extra model paths reach it too."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {EXTENSION})


def local_files() -> list[str]:
    """Return the names of the files that are there."""
    return folder_paths.get_filename_list(FOLDER)


def published_files() -> list[str]:
    """Return the names of CLEAR's files, there or not."""
    return [file.file for file in CLEAR_FILES.values()]


def find(name: str) -> Path | None:
    """Return the path of a file that is there, None if it is not; a name from another system has other slashes."""
    for each in (name, name.replace("\\", "/")):
        path = folder_paths.get_full_path(FOLDER, each)
        if path:
            return Path(path)
    return None


def is_choice(name: str | None, *others: str) -> bool | str:
    """Return whether a file of this name is there, or it is one of `others`; if not, what to do, as one sentence."""
    if not name or name in others or find(name) is not None:
        return True
    return f"there is no {name} in {_folder()}; put it there, or choose another file"


def state(name: str) -> tuple[int, int]:
    """Return (time of last change, size) of a file, zeros if it is not there."""
    path = find(name) if name else None
    return (path.stat().st_mtime_ns, path.stat().st_size) if path else (0, 0)


def fetch(name: str) -> Path:
    """Return the path of a file by name; download it if it is one of CLEAR's and not there.

    Raises:
        ValueError: there is no such file, or it could not be downloaded; one sentence.
    """
    path = find(name)
    if path is not None:
        return path
    published = next((file for file in CLEAR_FILES.values() if file.file == name), None)
    if published is None:
        raise ValueError(f"there is no {name} in {_folder()}; put it there, or choose another file")
    return _download(published, allow_download=True)


def student_path(name: str, hub_file: str, allow_download: bool) -> Path:
    """Return the path of a student by its local name, or by `owner/repo/file[@revision]` on the Hub.

    Raises:
        ValueError: neither or both are given, or the file cannot be had; one sentence.
    """
    if bool(name) == bool(hub_file):
        raise ValueError(
            f"choose a student in {_folder()}, or write hub_file as owner/repo/file.safetensors; one of both"
        )
    return fetch(name) if name else _download(parse_hub_file(hub_file), allow_download)


def check_name(name: str) -> list[str]:
    """Return the parts of a name for a new file: folders, then the file without its ending.

    Raises:
        ValueError: it would leave the folder or cannot be a name everywhere.
    """
    parts = name.strip().removesuffix(EXTENSION).split("/")
    if not all(PART.fullmatch(part) and not WINDOWS_NAMES.fullmatch(part) for part in parts):
        raise ValueError(f"name is a file's name, such as my_student or wan/high, in {_folder()}; got {name!r}")
    return parts


def new_path(name: str) -> Path:
    """Return a path in `models/linearize` that no file has: `<name>_00001_.safetensors`, or the next number.

    Args:
        name: without number and ending, folders before it with forward slashes; %year% and its like are replaced as in
            ComfyUI's own Save nodes.

    Raises:
        ValueError: the name would leave the folder or cannot be one everywhere, or its folder cannot be made.
    """
    parts = check_name(name)
    try:
        folder, stem, number, _, _ = folder_paths.get_save_image_path("/".join(parts), str(_folder()))
    except Exception as error:  # also where a folder in it leads elsewhere
        raise ValueError(f"cannot save {name!r} in {_folder()}: {str(error).strip('* ').splitlines()[0]}") from None
    while (path := Path(folder) / f"{stem}_{number:05}_{EXTENSION}").exists():
        number += 1
    return path


def shown_name(path: Path) -> str:
    """Return the name of a file in `models/linearize` as the nodes' lists show it."""
    return str(path.relative_to(_folder()))


def read_identified(path: Path, read: Callable[[Path], T]) -> tuple[T, str]:
    """Return what `read` makes of a file, and the file's name with the sha256 of the bytes that were read.

    The sha256 is the Hub's own or counted here. The name stands alone where it is not known: of large files put there
    by hand, and of a file that was changed or replaced meanwhile.
    """
    before, found = _stamp(path), None
    # a change right after another one may leave the same times
    sha256 = _sha256.__wrapped__ if time.time_ns() - max(before[-2:], default=0) < FRESH_NS else _sha256
    with contextlib.suppress(OSError):  # what `read` says of it is a better sentence
        found = sha256(path, before)
    result = read(path)
    with contextlib.suppress(OSError):  # it may be gone
        found = found if _stamp(path) == before and sha256(path, before) == found else None
    name = one_line(path.name, MAX_NAME)
    return result, f"{name} sha256:{found}" if found else name


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file does, its times last; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, ...]) -> str | None:
    recorded = recorded_sha256(path)
    if recorded is not None or stamp[2] > HASHED_BYTES:
        return recorded
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _download(file: HubFile, allow_download: bool) -> Path:
    bar: comfy.utils.ProgressBar | None = None
    place = executing()
    show = show_on_node(place.node_id if place else None)
    began = told = time.monotonic()
    first: int | None = None  # bytes that an earlier run fetched

    def progress(done: int, total: int) -> None:
        nonlocal bar, told, first
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)
        first, now = done if first is None else first, time.monotonic()
        if now - told >= TELL_S and done > first:
            told = now
            left = time_left((now - began) / (done - first) * (total - done))
            show(f"downloading {file.file} · {percent(done / total)} of {file_size(total)} · {left}")

    stop = comfy.model_management.throw_exception_if_processing_interrupted
    return download(file, _folder(), allow_download=allow_download, progress=progress, should_stop=stop).path
