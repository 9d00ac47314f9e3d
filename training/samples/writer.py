"""Writes a teacher's samples. A kill at any moment loses one sample at most, and the next run resumes from there.

A sample's files are there before its line in the index is. One process at a time writes to a folder.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from ...attention.atomic_file import clear_drafts, whole_file
from ...attention.shown import quote
from ...attention.students.tensor_file import FileProblem
from ...attention.students.tensor_values import content_sha256, is_finite
from .conditioning import CONDITIONINGS, Conditioning, read_conditioning
from .files import SamplesProblem, save_tensors
from .folder import LATENT
from .index import ABOUT, INDEX, LATENTS, About, Sample, has_files, latent_file, read_about, read_index

LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Request:
    """A sample that is asked for.

    Args:
        number: its place, prompt index x seeds + seed index.
        prompt: its text, empty where the conditioning came ready.
        positive, negative: files of its conditionings, None where they are not known yet.
    """

    number: int
    prompt: str
    positive: str | None = None
    negative: str | None = None


class SamplesWriter:
    """One folder of samples, locked while it is open; use it in a `with` statement.

    Args:
        folder: of the samples; made where it is missing.
        about: how they are made.

    Raises:
        SamplesProblem: on entering; another run writes there, the folder holds other files or samples that were made
            otherwise, or it cannot be written.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = Path(folder)
        self.about = about
        self.finished: dict[int, Sample] = {}
        self._lock = FileLock(self.folder / LOCK)

    def __enter__(self) -> "SamplesWriter":
        with self._saving():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise SamplesProblem(
                    f"another run is making samples in {self.folder}; wait for it, or choose a new name"
                ) from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Return the samples that are not there yet.

        Raises:
            SamplesProblem: there are more than are asked for, or one was made from another prompt or conditioning.
        """
        if self.finished and max(self.finished) >= len(requests):
            raise SamplesProblem(
                f"{self.folder} holds {max(self.finished) + 1} samples and {len(requests)} are asked for; prompts may "
                "be added at the end, not taken away, so choose a new name"
            )
        for number, sample in self.finished.items():
            asked = requests[number]
            if sample.prompt != asked.prompt:
                changed = f"the prompt {quote(sample.prompt)}, which is {quote(asked.prompt)} now"
            elif asked.positive not in (None, sample.positive) or asked.negative not in (None, sample.negative):
                changed = "another conditioning"
            else:
                continue
            raise SamplesProblem(
                f"sample {number} in {self.folder} was made from {changed}; prompts may be added at the end, for "
                "other changes choose a new name"
            )
        return [each for each in requests if each.number not in self.finished]

    def put(self, conditioning: Conditioning) -> str:
        """Store a conditioning unless it is there; return its file.

        Raises:
            SamplesProblem: it holds NaN or infinity, or could not be written.
        """
        tensors, file = conditioning.stored(), conditioning.file
        broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if broken:
            raise SamplesProblem(f"a conditioning holds NaN or infinity in {quote(broken[0])}; no sample is made of it")
        if not (self.folder / file).is_file():
            with self._saving():
                save_tensors(self.folder / file, tensors, conditioning.stored_values())
        return file

    def conditioning(self, file: str) -> Conditioning:
        """Return a stored conditioning.

        Raises:
            ValueError: it cannot be read; one sentence.
        """
        return read_conditioning(self.folder / file)

    def add(self, number: int, prompt: str, latent: Tensor, positive: str, negative: str | None) -> Sample:
        """Store a sample: first its latent, then its line in the index. It is safe when this returns.

        Args:
            number: its place; its seed follows from it.
            latent: (1, C, ...) of `about.latent_shape`, any float dtype and device.
            positive, negative: files of its conditionings, as `put` returned them.

        Raises:
            SamplesProblem: the latent has another shape, holds NaN or infinity, or could not be written.
        """
        if tuple(latent.shape) != self.about.latent_shape:
            raise SamplesProblem(
                f"sample {number} has shape {tuple(latent.shape)} where {self.about.latent_shape} was asked for"
            )
        if not is_finite(latent):
            raise SamplesProblem(
                f"sample {number} came out as NaN or infinity; sample this model with another dtype, sampler or size"
            )
        file, tensors, seed = latent_file(number), {LATENT: latent.detach().cpu()}, self.about.seed(number)
        sha256 = content_sha256(tensors)
        sample = Sample(number, prompt, seed, tuple(latent.shape), file, sha256, positive, negative)
        with self._saving():
            save_tensors(self.folder / file, tensors)
            append_line(self.folder / INDEX, sample.line())
        self.finished[number] = sample
        return sample

    def _open(self) -> None:
        """Remove what a kill left, and find the finished samples."""
        ours = {LOCK, ABOUT, INDEX, LATENTS, CONDITIONINGS}
        with self._saving():
            clear_drafts(self.folder, 0)
            # an earlier version called its draft of about.json otherwise
            (self.folder / f".{ABOUT}.tmp").unlink(missing_ok=True)
            left = [path for path in self.folder.iterdir() if path.name not in ours]
            if left and not (self.folder / ABOUT).exists():
                raise SamplesProblem(f"{self.folder} holds other files, such as {left[0].name}; choose a new name")
            for name in (LATENTS, CONDITIONINGS):
                (self.folder / name).mkdir(exist_ok=True)
                clear_drafts(self.folder / name, 0)
        earlier = read_about(self.folder) if (self.folder / ABOUT).exists() else None
        self.finished = self._read_index(earlier) if earlier else {}
        changes = self.about.differences(earlier) if earlier and self.finished else []
        if changes:
            raise SamplesProblem(
                f"{self.folder} holds samples that were made otherwise: {', '.join(changes)}; choose a new name, or "
                "set it back"
            )
        if earlier is None or not self.finished:
            with self._saving():
                replace_file(self.folder / ABOUT, json.dumps(self.about.to_json(), indent=1).encode() + b"\n")

    def _read_index(self, about: About) -> dict[int, Sample]:
        """Return the samples whose files are there; the index lists only those afterwards."""
        listed, is_torn = read_index(self.folder, about)
        found = {number: sample for number, sample in listed.items() if has_files(self.folder, sample)}
        if is_torn or len(found) < len(listed):
            with self._saving():
                replace_file(self.folder / INDEX, b"".join(sample.line() for sample in found.values()))
        return found

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, FileProblem) as error:
            if isinstance(error, Timeout):
                raise
            reason = (
                f"{self.folder} cannot be written: {error.strerror or error}" if isinstance(error, OSError) else error
            )
            safe = f"; its {len(self.finished)} finished samples are safe, and a next run goes on from there"
            raise SamplesProblem(f"{reason}{safe if self.finished else ''}") from None


def append_line(path: Path, line: bytes) -> None:
    """Append a line and flush it to the disk; undo a failed attempt."""
    with path.open("ab", buffering=0) as file:
        start, rest = file.tell(), memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a file; it holds the whole content or what it held before."""
    with whole_file(path) as file:
        file.write(content)
