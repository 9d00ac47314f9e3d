"""Untrusted safetensors files: checked before anything is loaded, and never left half written.

Headers are checked and tensors are read here, not by `safetensors` (seen at 0.8), for four reasons. `safe_open` maps
the file, so a file that is cut short while it is read ends the process with a bus error. It lets a name that occurs
twice pass. Its errors do not tell a user what is wrong. And `save_file` opens files by name, so it cannot write into
`atomic_file.whole_file`. What the tensors mean is not known here; `file.py` and its siblings know.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..atomic_file import whole_file
from ..checks import parse_json
from ..shown import LONGEST, one_line, quote
from .tensor_values import is_finite, tensor_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 4 * 2**20  # thirty thousand tensors; reading one of lies takes 30 times its size
MAX_DIMS = 64  # of a PyTorch tensor that can be computed with
MAX_NAME = 500  # characters of a tensor's name; real ones have under 100
LONGEST_FAULT = 240  # characters of what is wrong with a file


class FileProblem(ValueError):
    """A file that cannot be used; the message is one sentence that names it."""


def problem(path: Path, text: str) -> FileProblem:
    """Return the FileProblem that says `text`, a predicate such as "is empty", of the file at `path`."""
    return FileProblem(f"{file_name(path)} {text}")


def file_name(path: Path) -> str:
    """Return the name of a file for people; the folder it lies in is nobody's business but its owner's."""
    return one_line(path.name)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor; `start` is its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header was checked and whose tensors were not read yet.

    Args:
        path: of the file.
        metadata: the texts of its header.
        tensors: what it holds, by name.
        data_start: first byte after the header.
        header_sha256: of the bytes before that.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    data_start: int
    header_sha256: str

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors on the CPU, in memory of their own (the file may be replaced meanwhile).

        Raises:
            FileProblem: a name is not there, a float tensor holds NaN or infinity, or the file changed since it was
                opened.
        """
        loaded: dict[str, Tensor] = {}
        # read, not mapped: touching the map of a file that was cut short kills the process
        with _opened(self.path) as file:
            if hashlib.sha256(file.read(self.data_start)).hexdigest() != self.header_sha256:
                raise problem(self.path, "changed while it was read; load it again")
            for name in names:
                if name not in self.tensors:
                    raise problem(self.path, f"has no tensor {quote(name)}")
                info = self.tensors[name]
                file.seek(self.data_start + info.start)
                loaded[name] = torch.empty(info.shape, dtype=info.dtype)
                if info.num_bytes and file.readinto(tensor_bytes(loaded[name])) != info.num_bytes:
                    raise problem(self.path, "became shorter while it was read; load it again")
        for name, tensor in loaded.items():
            if not is_finite(tensor):
                raise problem(self.path, f"holds NaN or infinity in {quote(name)}; it is damaged, download it again")
        return loaded


def open_tensor_file(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
    """Return the file at `path`, its header checked in full; no tensor is read and no memory taken for one.

    Args:
        path: of a safetensors file: 8 bytes with the length of the header, the header in JSON, the tensors' bytes.
        max_header_bytes: longest header that is read.

    Raises:
        FileProblem: there is no such file, it is another kind of file (pickle checkpoints by name), it is truncated or
            has bytes too many, or its header contradicts itself or the bytes that follow.

    Source: the format's description, github.com/huggingface/safetensors.
    """
    path = Path(path)
    start, text, data_bytes = _read_header(path, max_header_bytes)
    try:
        header = _parse_header(path, text)
        metadata = _metadata(path, header.pop("__metadata__", {}))
        tensors = {name: _entry(path, name, entry) for name, entry in header.items()}
        _check_extents(path, tensors, data_bytes)
    except FileProblem as fault:
        raise FileProblem(f"{one_line(str(fault), LONGEST_FAULT)}; download it again, or choose another file") from None
    return TensorFile(path, metadata, tensors, 8 + len(text), hashlib.sha256(start + text).hexdigest())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read it; what the system says against that is a FileProblem."""
    try:
        if not path.is_file():
            raise problem(
                path,
                "is a folder or a device, not a file; choose a safetensors file"
                if path.exists()
                else "does not exist any more; choose another file, or put it back",
            )
        with path.open("rb") as file:
            yield file
    except FileProblem:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise problem(path, f"cannot be read: {_one_line(error)}; choose a file that ComfyUI may read") from None


def _read_header(path: Path, max_header_bytes: int) -> tuple[bytes, bytes, int]:
    """Return the 8 bytes before the header, the header's bytes, and how many bytes follow it."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        _check_start(path, start, size, length, max_header_bytes)
        file.seek(8)
        text = file.read(length)
        if len(text) < length:
            raise problem(path, "became shorter while it was read; load it again")
        return start[:8], text, size - 8 - length


def _check_start(path: Path, start: bytes, size: int, length: int, max_header_bytes: int) -> None:
    # a header of 640 or 19280 bytes also starts like a pickle or a zip archive, but then { follows
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise problem(path, "is a pickle file, which can run code; convert it to safetensors")
    if size < 8:
        raise problem(
            path, f"is not a safetensors file: it has {size} bytes, the length of its header takes 8; download it again"
        )
    if length == 0:
        raise problem(path, "is not a safetensors file: it says that its header is empty; choose another one")
    if length > max_header_bytes and start[8:] == b"{":
        raise problem(
            path, f"says that its header has {length} bytes, at most {max_header_bytes} are read; choose another one"
        )
    if start[8:] not in (b"{", b""):
        raise problem(path, "is not a safetensors file: its header does not begin with {; choose another one")
    if length > size - 8:
        raise problem(
            path,
            f"is truncated in its header: {length} bytes are announced and {size - 8} are there; download it again",
        )


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, value in pairs:
            if name in names:
                raise problem(path, f"has {quote(name)} twice in its header")
            names[name] = value
        return names

    try:
        header = parse_json(text, unique)
    except FileProblem:
        raise
    except ValueError as error:
        raise problem(path, f"has a header that {error}") from None
    if not isinstance(header, dict):
        raise problem(path, "has a header that is not a JSON object")
    return header


def _metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise problem(path, f"has metadata that is not an object of texts, got {quote(metadata)}")
    for name, value in metadata.items():
        if not (_is_text(name) and _is_text(value)):
            raise problem(path, f"has metadata {quote(name)} that is not a text, got {quote(value)}")
    return metadata


def _entry(path: Path, name: str, entry: object) -> TensorInfo:
    """Return what the header says of one tensor."""
    if not _is_text(name):
        raise problem(path, f"has a tensor whose name is not a text, got {quote(name)}")
    if len(name) > MAX_NAME:
        raise problem(path, f"has a tensor whose name is longer than {MAX_NAME} characters, got {quote(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise problem(path, f"describes tensor {quote(name)} by other things than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise problem(path, f"has tensor {quote(name)} of dtype {quote(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise problem(path, f"has tensor {quote(name)} whose shape is not a list of at most {MAX_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise problem(path, f"has tensor {quote(name)} whose data_offsets are not a start and a stop")
    start, stop = offsets
    info = TensorInfo(DTYPES[dtype], tuple(shape), start)
    # also of empty tensors, whose strides PyTorch computes all the same
    if math.prod(size or 1 for size in shape) >= 2**62:
        raise problem(path, f"has tensor {quote(name)} of an impossible size, shape {quote(shape)}")
    if stop - start != info.num_bytes:
        raise problem(
            path,
            f"gives tensor {quote(name)} {quote(stop - start)} bytes where {dtype} of shape {quote(shape)} takes"
            f" {info.num_bytes}",
        )
    return info


def _check_extents(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Check that the tensors fill the bytes after the header, without hole or overlap."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise problem(
                path, f"has tensor {quote(name)} at byte {quote(info.start)}, which {fault} (it ends at {end})"
            )
        end += info.num_bytes
    if end > data_bytes:
        raise problem(path, f"is truncated: its tensors take {end} bytes and {data_bytes} are there")
    if end < data_bytes:
        raise problem(path, f"has {data_bytes - end} bytes too many after its tensors")


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _is_text(value: object) -> bool:
    """Return whether `value` is text that UTF-8 can hold; JSON escapes can spell half a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return one_line(" ".join((reason or str(error) or type(error).__name__).split()), 2 * LONGEST)


def write_tensor_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    replace: bool = True,
    before: Path | None = None,
) -> None:
    """Write a safetensors file so that `path` holds the whole of it or what it held before, whatever happens.

    Args:
        path: of the file, in a folder that exists.
        tensors: by name, of any device and stride; dtypes as in DTYPES.
        metadata: texts for the header.
        replace, before: what becomes of a file that is there, see `atomic_file.whole_file`.

    Raises:
        FileProblem: a value is NaN or infinite, a dtype or name cannot be stored, or the disk refuses.
        FileExistsError: there is a file, and nothing says what becomes of it.
    """
    path = Path(path)
    for name, value in metadata.items():
        if not (_is_text(name) and _is_text(value)):
            raise problem(path, f"cannot be written: metadata {quote(name)} is not a text, got {quote(value)}")
    stored = _storable(path, tensors)
    try:
        with whole_file(path, replace=replace, before=before) as file:
            _write(file, stored, metadata)
    except FileExistsError:
        raise
    except OSError as error:
        raise problem(path, f"cannot be written: {_one_line(error)}") from None


def _storable(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, in the order of the file: wide types first, which aligns them all."""
    stored: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if not _is_text(name) or name == "__metadata__" or len(name) > MAX_NAME:
            raise problem(path, f"cannot be written: {quote(name)} is no name for a tensor")
        if tensor.dtype not in DTYPES.values():
            raise problem(path, f"cannot be written: {quote(name)} is {tensor.dtype}; known are {', '.join(DTYPES)}")
        stored[name] = tensor.detach().cpu().contiguous()
        if not is_finite(stored[name]):
            raise problem(path, f"was not written: {quote(name)} holds NaN or infinity")
    return stored


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # not by the library, which opens files by name and leaves drafts of its own behind
    names, start = {dtype: name for name, dtype in DTYPES.items()}, 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor_bytes(tensor))
