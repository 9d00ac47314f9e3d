"""Tensor files: every wrong file is one sentence before anything is loaded, and no write leaves half a file."""

import io
import json
import os
import stat
import sys
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize.attention.students import tensor_file, tensor_values
from linearize.attention.students.tensor_file import (
    DTYPES,
    FileProblem,
    TensorInfo,
    open_tensor_file,
    write_tensor_file,
)

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
PICKLED = b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01K\x01s."  # protocol 2, a dictionary


def raw(header, data=bytes(8), length=None):
    """Return the bytes of a file with this header, given as text, bytes or an object."""
    text = header if isinstance(header, (bytes, str)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def archive():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", PICKLED)
    return content.getvalue()


def entry(**changes):
    return {"weight": {**ONE, **changes}}


WRONG = {
    "empty": (b"", "it has 0 bytes"),
    "short": (b"abc", "it has 3 bytes"),
    "pickle": (PICKLED, "is a pickle file, which can run code; convert it to safetensors"),
    "short pickle": (b"\x80\x04N.", "is a pickle file"),
    "zip": (archive(), "is a pickle file, which can run code; convert it to safetensors"),
    "page": (b"<!DOCTYPE html><html></html>", "is not a safetensors file: its header does not begin with {"),
    "no header": (raw(b""), "its header is empty"),
    "only length": ((50).to_bytes(8, "little"), "truncated in its header: 50 bytes are announced and 0 are there"),
    "long header": (raw("{}", length=2**27), "says that its header has 134217728 bytes, at most 4194304"),
    "longest header": (raw("{}", length=2**64 - 1), "at most 4194304 are read"),
    "header beyond end": (raw("{}", b"", length=3), "truncated in its header: 3 bytes are announced and 2"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "not JSON": (raw("{weight}"), "not JSON: Expecting property name"),
    "two objects": (raw("{}{}"), "not JSON: Extra data"),
    "deep": (raw('{"a":' + "[" * 100_000), "not JSON"),
    "deep and closed": (raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "has a header that is not JSON"),
    "long number": (raw('{"a": ' + "1" * 5000 + "}"), "not JSON"),
    "two tensors of a name": (raw('{"a": {}, "a": {}}'), "has 'a' twice in its header"),
    "key twice": (raw('{"a": {"dtype": "F32", "dtype": "F16"}}'), "has 'dtype' twice"),
    "metadata list": (raw({"__metadata__": ["a"], **entry()}), "metadata that is not an object of texts"),
    "metadata number": (raw({"__metadata__": {"a": 1}, **entry()}), "metadata 'a' that is not a text, got 1"),
    "metadata object": (raw({"__metadata__": {"a": {"b": "c"}}, **entry()}), "metadata 'a' that is not a text"),
    "half a character": (raw('{"__metadata__": {"a": "\\ud800"}}', b""), "metadata 'a' that is not a text"),
    "half a character in a name": (raw('{"\\ud800": {}}'), "name is not a text"),
    "long name": (raw({"a" * 501: ONE}), "longer than 500 characters"),
    "entry of another kind": (raw({"weight": [1]}), "describes tensor 'weight' by other things"),
    "key missing": (raw({"weight": {"dtype": "F32", "shape": [2]}}), "other things than dtype, shape and data_offsets"),
    "key too many": (raw(entry(strides=[1])), "describes tensor 'weight' by other things"),
    "dtype": (raw(entry(dtype="F31")), "of dtype 'F31'; known are F64, F32"),
    "dtype of another kind": (raw(entry(dtype=["F32"])), "of dtype ['F32']"),
    "shape text": (raw(entry(shape="2")), "shape is not a list"),
    "shape negative": (raw(entry(shape=[-2])), "shape is not a list"),
    "shape fraction": (raw(entry(shape=[2.0])), "shape is not a list"),
    "shape truth": (raw(entry(shape=[True, 2])), "shape is not a list"),
    "shape deep": (raw(entry(shape=[1] * 65 + [2])), "at most 64 sizes"),
    "offsets": (raw(entry(data_offsets=[0, 4, 8])), "not a start and a stop"),
    "offset negative": (raw(entry(data_offsets=[-8, 0])), "not a start and a stop"),
    "offsets reversed": (raw(entry(data_offsets=[8, 0])), "gives tensor 'weight' -8 bytes"),
    "huge": (raw(entry(shape=[2**62])), "of an impossible size, shape [4611686018427387904]"),
    "huge product": (raw(entry(shape=[2**32, 2**32])), "of an impossible size"),
    "huge and empty": (raw(entry(shape=[0, 2**62], data_offsets=[0, 0]), b""), "of an impossible size"),
    "huge of small": (raw(entry(shape=[2**40])), "8 bytes where F32 of shape [1099511627776] takes 4398046511104"),
    "length": (raw(entry(data_offsets=[0, 4])), "gives tensor 'weight' 4 bytes where F32 of shape [2] takes 8"),
    "hole first": (raw(entry(data_offsets=[4, 12]), bytes(12)), "leaves a hole before it (it ends at 0)"),
    "hole": (raw({"a": ONE, "b": {**ONE, "data_offsets": [9, 17]}}, bytes(17)), "tensor 'b' at byte 9, which leaves"),
    "overlap": (raw({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)), "'b' at byte 4, which overlaps"),
    "shared": (raw({"a": ONE, "b": ONE}), "'b' at byte 0, which overlaps"),
    "truncated": (raw(entry(), bytes(7)), "is truncated: its tensors take 8 bytes and 7 are there"),
    "trailing": (raw(entry(), bytes(19)), "has 11 bytes too many after its tensors"),
    "list": (raw(b"[{}]"), "does not begin with {"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_clear_sentence(tmp_path, kind):
    content, words = WRONG[kind]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(FileProblem) as error:
        open_tensor_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = str(error.value)
    assert said.startswith("wrong.safetensors ") and words in said
    assert "\n" not in said and len(said) < 300
    assert peak < 30e6


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileProblem, match="nowhere.safetensors does not exist any more; choose another file"):
        open_tensor_file(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileProblem, match="is a folder or a device, not a file"):
        open_tensor_file(tmp_path)
    with pytest.raises(FileProblem, match=r"^a\\x00b "):
        open_tensor_file(tmp_path / "a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileProblem, match="pipe is a folder or a device, not a file"):
        open_tensor_file(tmp_path / "pipe")


def test_an_unreadable_file_says_why(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, {}, {})
    monkeypatch.setattr("pathlib.Path.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(FileProblem, match=r"^a.safetensors cannot be read: Permission denied; choose a file that"):
        open_tensor_file(path)


def test_round_trip_of_every_dtype_stride_and_shape(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {name: (base % 2 == 0) if name == "BOOL" else base.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"transposed": base.T, "again": base, "row": base[1], "scalar": torch.tensor(2.0)}
    tensors |= {"none": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base.clone())}
    metadata = {"format": "test", "text": 'é "quoted"\nline'}
    write_tensor_file(tmp_path / "all.safetensors", tensors, metadata)
    file = open_tensor_file(tmp_path / "all.safetensors")
    assert file.metadata == metadata
    assert file.tensors == {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    loaded = file.load(file.tensors)
    assert list(loaded) == list(file.tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name].double(), tensor.detach().double()) and loaded[name].device.type == "cpu"
    assert list(file.load(["row"])) == ["row"] and file.load([]) == {}


@pytest.mark.parametrize("length", [640, 896, 19280, 0x4B50 + 0x10000])
def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path, length):
    """640 begins with the bytes of a pickle and 19280 with those of a zip archive."""
    text = json.dumps(entry()).ljust(length)
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(text))
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"PK")
    assert open_tensor_file(path).load(["weight"])["weight"].tolist() == [0.0, 0.0]


def test_header_limit_can_be_chosen(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(entry()))
    with pytest.raises(FileProblem, match="at most 16 are read"):
        open_tensor_file(path, max_header_bytes=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinity_are_neither_loaded_nor_written(tmp_path, monkeypatch, value, dtype):
    path = tmp_path / "a.safetensors"
    bad = torch.tensor([1.0, value]).to(dtype)
    with pytest.raises(FileProblem, match="was not written: 'bad' holds NaN or infinity"):
        write_tensor_file(path, {"bad": bad}, {})
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "is_finite", lambda _: True)
        write_tensor_file(path, {"good": torch.ones(2), "bad": bad}, {})
    file = open_tensor_file(path)
    assert file.load(["good"])["good"].tolist() == [1.0, 1.0]
    with pytest.raises(FileProblem, match="holds NaN or infinity in 'bad'"):
        file.load(file.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(dtype, monkeypatch):
    """In every part that is looked at together, and in a short last one."""
    monkeypatch.setattr(tensor_values, "FINITE_CHUNK", 4)
    assert tensor_values.is_finite(torch.ones(3, 3).to(dtype)) and tensor_values.is_finite(torch.ones(0).to(dtype))
    for place in range(9):
        values = torch.ones(9)
        values[place] = float("nan")
        assert not tensor_values.is_finite(values.reshape(3, 3).to(dtype)), place


def test_large_float64_is_finite(tmp_path):
    write_tensor_file(tmp_path / "a", {"a": torch.tensor([1e300], dtype=torch.float64)}, {})
    assert open_tensor_file(tmp_path / "a").load(["a"])["a"].item() == 1e300


def test_loading_from_a_file_that_changed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, {"a": torch.ones(2)}, {})
    file = open_tensor_file(path)
    with pytest.raises(FileProblem, match="has no tensor 'b'"):
        file.load(["b"])
    kept = file.load(["a"])["a"]
    write_tensor_file(path, {"a": torch.zeros(3)}, {})
    assert kept.tolist() == [1.0, 1.0]
    for content in (None, b"gone", b""):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FileProblem, match="a.safetensors changed while it was read; load it again"):
            file.load(["a"])
    path.unlink()
    with pytest.raises(FileProblem, match="does not exist any more") as error:
        file.load(["a"])
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    """Touching the map of such a file would end the process; it is a sentence here."""
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, {"a": torch.ones(2**20), "b": torch.ones(5)}, {})
    file = open_tensor_file(path)
    size = path.stat().st_size
    for left in (size - 1, size // 2, file.data_start):
        os.truncate(path, left)
        with pytest.raises(FileProblem, match="became shorter while it was read; load it again"):
            file.load(["a", "b"])


def test_files_are_those_of_the_library(tmp_path):
    """The bytes that safetensors writes, and it reads what is written here."""
    base = torch.arange(15.0).reshape(3, 5)
    tensors = {name: (base % 2 == 0) if name == "BOOL" else base.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"one": torch.tensor(2.0), "none": torch.zeros(0, 3)}
    path, other = tmp_path / "a", tmp_path / "b"
    write_tensor_file(path, tensors, {"format": "test", "é": "ü"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name].double(), tensor.double()) for name, tensor in tensors.items())
    save_file(tensors, other, {"format": "test", "é": "ü"})
    ours, theirs = open_tensor_file(path), open_tensor_file(other)
    assert ours.tensors == theirs.tensors and ours.metadata == theirs.metadata
    assert path.stat().st_size == other.stat().st_size


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"a": torch.zeros(1, dtype=torch.complex64)}, {}, "'a' is torch.complex64; known are F64"),
        ({"__metadata__": torch.zeros(1)}, {}, "'__metadata__' is no name for a tensor"),
        ({"\ud800": torch.zeros(1)}, {}, "is no name for a tensor"),
        ({"a" * 501: torch.zeros(1)}, {}, "is no name for a tensor"),
        ({}, {"a": 1}, "metadata 'a' is not a text, got 1"),
        ({}, {"a": "\ud800"}, "metadata 'a' is not a text"),
    ],
)
def test_what_cannot_be_stored_is_one_clear_sentence(tmp_path, tensors, metadata, words):
    with pytest.raises(FileProblem) as error:
        write_tensor_file(tmp_path / "a", tensors, metadata)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["_write", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step, error):
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def fail(*_):
        raise error

    owner = tensor_file if step == "_write" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, step.rpartition(".")[2], fail)
        with pytest.raises((FileProblem, KeyboardInterrupt)) as raised:
            write_tensor_file(path, {"a": torch.zeros(2)}, {})
    if isinstance(error, OSError):
        assert str(raised.value) == "a.safetensors cannot be written: No space left on device"
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_writing_where_it_cannot_be_written(tmp_path):
    with pytest.raises(FileProblem, match="^a cannot be written: "):
        write_tensor_file(tmp_path / "no folder" / "a", {}, {})
    with pytest.raises(FileProblem, match=" cannot be written: "):
        write_tensor_file(tmp_path, {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no permission bits there")
def test_the_file_may_be_read_by_whoever_may_read_its_neighbours(tmp_path):
    (tmp_path / "neighbour").touch()
    write_tensor_file(tmp_path / "a", {"a": torch.ones(1)}, {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
