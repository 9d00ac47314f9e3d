"""Whatever file is given to Load, and what becomes of it meanwhile: one short sentence with the file's name."""

import io
import json
import os
import signal
import threading
import tracemalloc
import zipfile
from contextlib import contextmanager

import pytest
import torch

from linearize.attention.plans import Plan
from linearize.attention.students.file import StudentFile, load_student, save_student
from linearize.attention.students.tensor_file import FileProblem, open_tensor_file, write_tensor_file

NAME, SECONDS, PEAK = "given.safetensors", 5, 120e6
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 9
ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def of_bytes(content):
    return lambda path: path.write_bytes(content)


def of_header(header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return of_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)


def archive(path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
    path.write_bytes(content.getvalue())


def sparse(path):
    with path.open("wb") as file:
        file.write((2**40 - 16).to_bytes(8, "little") + b"{")
        file.truncate(2**40)


def long_header(path):
    text = b'{"a":' + b" " * (64 * 2**20 - 7) + b"1}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def another_kind(path):
    write_tensor_file(path, {"a": torch.ones(3)}, {"format": "x" * 10**5})


FILES = {
    "folder": lambda path: path.mkdir(),
    "nothing there": lambda path: None,
    "broken link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
    "empty": of_bytes(b""),
    "one byte": of_bytes(b"{"),
    "picture": of_bytes(PNG),
    "page": of_bytes(b"<!DOCTYPE html><html>" * 99),
    "pickle": of_bytes(b"\x80\x04\x95" + bytes(99)),
    "zip": archive,
    "text": of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    "zeros": of_bytes(bytes(4096)),
    "a terabyte of nothing": sparse,
    "header of 64 MiB": long_header,
    "hundred thousand tensors": of_header({f"t{n}": ENTRY for n in range(10**5)}),
    "ten thousand tensors": of_header({f"t{n}": ENTRY for n in range(10**4)}),
    "long names": of_header({f"{n}" * 450: {**ENTRY, "dtype": "x" * 10**4} for n in range(2)}),
    "long metadata": of_header({"__metadata__": {"format": "linearize/1", "plan": "x" * 10**6}}),
    "metadata of another kind": of_header({"__metadata__": ["x" * 10**5] * 9}),
    "another kind": another_kind,
}


@contextmanager
def limited():
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(AssertionError("it hangs")))
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("load", [load_student, open_tensor_file], ids=["student", "tensors"])
@pytest.mark.parametrize("kind", FILES)
def test_any_file_is_one_sentence(tmp_path, kind, load):
    FILES[kind](tmp_path / NAME)
    if load is open_tensor_file and kind in ("another kind", "ten thousand tensors", "long metadata"):
        return
    with limited(), pytest.raises(FileProblem) as problem:
        load(tmp_path / NAME)
    said = str(problem.value)
    assert said.startswith(NAME) and said.isprintable() and len(said) <= 360, (len(said), said)
    assert str(tmp_path) not in said, "the name, not the place"
    assert any(word in said for word in ("choose", "download it again", "convert it", "load it again")), said


def test_a_file_that_may_not_be_read(tmp_path):
    save_student(tmp_path / NAME, StudentFile(host="flux", plan=Plan("flux")))
    (tmp_path / NAME).chmod(0)
    if os.access(tmp_path / NAME, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(FileProblem, match=f"{NAME} cannot be read: Permission denied; choose a file that ComfyUI may"):
        load_student(tmp_path / NAME)


def test_a_long_name_is_shown_in_part(tmp_path):
    path = tmp_path / ("x" * 240 + ".safetensors")
    path.write_bytes(PNG)
    with pytest.raises(FileProblem) as problem:
        load_student(path)
    assert len(str(problem.value)) < 300


def test_a_file_that_shrinks_and_grows_while_it_is_read(tmp_path):
    """A thread cuts the file and writes it again, over and over: whole students, or sentences."""
    path = tmp_path / NAME
    tensors = {f"double.{n}.pool": torch.full((64, 64), float(n)) for n in range(40)}
    save_student(path, StudentFile(host="flux", plan=Plan("flux"), parameters=tensors))
    content, done = path.read_bytes(), threading.Event()

    def spoil():
        size = len(content)
        while not done.is_set():
            for left in (size // 2, 40, size - 1, 0):
                os.truncate(path, left)
                path.write_bytes(content)

    thread = threading.Thread(target=spoil)
    thread.start()
    outcomes = []
    try:
        for _ in range(300):
            try:
                outcomes.append(len(load_student(path).parameters))
            except FileProblem as problem:
                outcomes.append(str(problem))
    finally:
        done.set()
        thread.join()
    assert {each for each in outcomes if isinstance(each, int)} <= {40}
    assert any(isinstance(each, str) for each in outcomes)
