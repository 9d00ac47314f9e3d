"""Files that are whole or not there: real kills, two writers of one name, systems without files that have no name."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from linearize.attention import atomic_file
from linearize.attention.atomic_file import clear_drafts, whole_file
from linearize.attention.students.tensor_file import open_tensor_file, write_tensor_file

KILLS = 24
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture(params=["nameless", "hidden", "no links", "no links, oddly"])
def system(request, monkeypatch):
    """What a system offers for a file that is not whole yet."""
    if request.param != "nameless":
        monkeypatch.setattr(atomic_file, "_nameless", lambda folder: None)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no files without a name")
    if request.param.startswith("no links"):
        number = errno.EPERM if request.param == "no links" else errno.EINVAL  # as some of FUSE have it
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(number, "refused")))
    return request.param


@can_fork
@pytest.mark.parametrize("how", ["nameless", "hidden"])
def test_kills_leave_whole_files_and_nothing_else(how, tmp_path):
    script = Path(__file__).with_name("run_kills.py")
    arguments = [str(tmp_path), str(KILLS), *(["hidden"] if how == "hidden" else [])]
    run = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    left = [name for name in names(tmp_path) if not name.endswith(".safetensors")]
    files = [name for name in names(tmp_path) if name.endswith(".safetensors")]
    assert len(files) >= 3, "it was killed while it wrote, not before"
    is_nameless = how == "nameless" and hasattr(os, "O_TMPFILE")
    for name in [*files, *(left if is_nameless else [])]:  # a file that replaces another has a hidden name when whole
        loaded = open_tensor_file(tmp_path / name).load(["a", "b"])
        assert loaded["a"].unique().tolist() == [1.0] and loaded["b"].unique().tolist() == [2.0]
    assert len(left) <= 2 if is_nameless else left, "a hidden name is left by some of the kills, or by hardly any"
    for name in left:
        age(tmp_path / name, 3600)
    write_tensor_file(tmp_path / "next.safetensors", {"a": torch.ones(3)}, {})
    assert names(tmp_path) == sorted([*files, "next.safetensors"])


def test_only_drafts_that_nobody_writes_are_cleared(tmp_path):
    old, young, foreign, earlier = (
        tmp_path / name for name in (f".{'a' * 32}.tmp", f".{'b' * 32}.tmp", ".notes.tmp", ".tmpAb3dE9")
    )
    for path in (old, young, foreign, earlier):
        path.touch()
    for path in (old, foreign, earlier):
        age(path, 3600)
    clear_drafts(tmp_path)
    assert names(tmp_path) == sorted([young.name, foreign.name])
    clear_drafts(tmp_path, 0)
    assert names(tmp_path) == [foreign.name]
    clear_drafts(tmp_path / "nowhere")


def test_a_draft_that_another_process_writes_stays_however_old(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_file, "_nameless", lambda folder: None)
    with whole_file(tmp_path / "slow") as file:
        file.write(b"begun")
        file.flush()
        (draft,) = tmp_path.iterdir()
        age(draft, 10**6)
        subprocess.run([sys.executable, "-c", f"""
from pathlib import Path
from linearize.attention.atomic_file import clear_drafts
clear_drafts(Path({str(tmp_path)!r}), 0)"""], check=True)  # fmt: skip
        assert names(tmp_path) == [draft.name]
    assert (tmp_path / "slow").read_bytes() == b"begun" and names(tmp_path) == ["slow"]


@pytest.mark.skipif(atomic_file.fcntl is None, reason="this system locks files otherwise")
def test_drafts_are_cleared_where_only_a_file_that_may_be_written_is_locked(tmp_path, monkeypatch):
    """On NFS and SMB an exclusive lock needs a descriptor that may write."""
    fcntl = atomic_file.fcntl

    def flock(descriptor, how):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / f".{'a' * 32}.tmp").touch()
    clear_drafts(tmp_path, 0)
    assert not names(tmp_path)


def test_what_becomes_of_a_file_that_is_there(system, tmp_path):
    path, before = tmp_path / "a", tmp_path / "a.before"

    def write(text, **options):
        with whole_file(path, **options) as file:
            file.write(text)

    write(b"1")
    write(b"2")
    assert path.read_bytes() == b"2" and names(tmp_path) == ["a"]
    with pytest.raises(FileExistsError):
        write(b"3", replace=False)
    assert path.read_bytes() == b"2" and names(tmp_path) == ["a"]
    for text, kept in ((b"4", b"2"), (b"5", b"4")):
        write(text, before=before)
        assert (path.read_bytes(), before.read_bytes()) == (text, kept)
    path.unlink()
    write(b"6", before=before)
    assert (path.read_bytes(), before.read_bytes()) == (b"6", b"4")
    path.unlink()
    write(b"7", replace=False)
    assert path.read_bytes() == b"7" and names(tmp_path) == ["a", "a.before"]


def test_a_block_that_fails_leaves_what_was_there(system, tmp_path):
    for options in ({}, {"replace": False}, {"before": tmp_path / "b"}):
        with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a", **options) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert not names(tmp_path)


SAVE_SOME = """
import sys
from pathlib import Path
import torch
from linearize.attention import atomic_file
from linearize.attention.students.tensor_file import write_tensor_file
folder, mark = Path(sys.argv[1]), float(sys.argv[2])
if sys.argv[3] == "hidden":
    atomic_file._nameless = lambda folder: None
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    number = 1
    while True:
        try:
            write_tensor_file(folder / f"student_{number}", {"a": torch.full((9,), mark)}, {}, replace=False)
            break
        except FileExistsError:
            number += 1
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no files without a name")
def test_a_file_has_no_name_before_it_is_whole(tmp_path):
    with whole_file(tmp_path / "a") as file:
        file.write(b"whole")
        file.flush()
        assert names(tmp_path) == []
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.skipif(atomic_file.fcntl is None, reason="this system removes no file that is open")
def test_a_draft_stays_while_it_is_locked_however_old(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_file, "_nameless", lambda folder: None)
    with whole_file(tmp_path / "a") as file:
        file.write(b"whole")
        file.flush()
        (draft,) = tmp_path.iterdir()
        age(draft, 3600)
        clear_drafts(tmp_path)
        assert names(tmp_path) == [draft.name]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("how", ["nameless", "hidden"])
def test_two_processes_that_save_one_name_lose_nothing(how, tmp_path):
    children = [
        subprocess.Popen([sys.executable, "-c", SAVE_SOME, str(tmp_path), mark, how],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for mark in "12"
    ]  # fmt: skip
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait() for child in children] == [0, 0]
    assert names(tmp_path) == sorted(f"student_{number}" for number in range(1, 41))
    marks = [open_tensor_file(path).load(["a"])["a"][0].item() for path in tmp_path.iterdir()]
    assert marks.count(1.0) == marks.count(2.0) == 20
