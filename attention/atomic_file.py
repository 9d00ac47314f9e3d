"""Files that are written whole or not at all, even if the process is killed.

On Linux a file has no name until it is whole, so a kill leaves nothing, unless it hits the moment in which a file that
replaces another changes its hidden name for the final one. Where a system or a disk cannot do that, a file has a hidden
name from the start, which its writer locks. Whoever writes there next clears away what a kill left.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None

DRAFT = re.compile(r"\.[0-9a-f]{32}\.tmp|\.tmp[A-Za-z0-9]{6}")  # ours, and those of safetensors, used formerly
YOUNG_S = 600  # a draft changed since then may be one that its writer has not locked yet, or has just unlocked


@contextlib.contextmanager
def whole_file(path: Path, *, replace: bool = True, before: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file to be written; it is at `path`, and on the disk, when the block has ended well, else nowhere.

    Args:
        path: in a folder that exists.
        replace: whether a file there may be replaced.
        before: what a file there is called afterwards instead of being replaced. A kill may leave that one alone.

    Raises:
        FileExistsError: there is a file, and nothing says what becomes of it. OSError: the disk refuses.
    """
    clear_drafts(path.parent)
    descriptor, draft = _nameless(path.parent), path.with_name(f".{uuid.uuid4().hex}.tmp")
    is_nameless, is_new = descriptor is not None, before is not None or not replace
    file = os.fdopen(descriptor if descriptor is not None else _locked(draft), "wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if before is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, before)
            if is_nameless:
                _name(file.fileno(), path if is_new else draft)
            elif os.name == "nt":  # where an open file keeps its name
                file.close()
            if not is_new:
                os.replace(draft, path)
            elif not is_nameless:
                _rename_to_new(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def clear_drafts(folder: Path, young_s: float = YOUNG_S) -> None:
    """Remove drafts that nobody writes any more.

    Args:
        folder: where they lie; one that is not there holds none.
        young_s: seconds since the last change for which a draft stays whoever holds it.
    """
    with contextlib.suppress(OSError):
        # before every write, so quick in folders of many files
        for path in [folder / name for name in os.listdir(folder) if name[0] == "." and DRAFT.fullmatch(name)]:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= young_s:
                    _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    # to be written, since network disks lock no other; whatever it is, nothing is waited for
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _nameless(folder: Path) -> int | None:
    """Return a descriptor of a new file without a name, None where that cannot be had."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        return None
    if os.path.exists(f"/proc/self/fd/{descriptor}"):
        return descriptor
    os.close(descriptor)
    return None


def _name(descriptor: int, path: Path) -> None:
    # a descriptor of a folder has Python call linkat, which alone follows the link in /proc; the path is absolute
    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


def _locked(draft: Path) -> int:
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _rename_to_new(draft: Path, path: Path) -> None:
    """Rename without ever replacing."""
    if os.name == "nt":
        os.rename(draft, path)
        return
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        # a disk without links, which says so in one of many ways: whoever makes the name first has it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(draft, path)
