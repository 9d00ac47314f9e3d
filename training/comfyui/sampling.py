"""Makes a teacher's samples with ComfyUI's own sampler.

Where the samples lie and how they survive a kill is known to `samples/writer.py`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...attention.words import counted, memory_size, percent, time_left
from ..samples.conditioning import Conditioning
from ..samples.files import SamplesProblem
from ..samples.folder import TeacherSamples
from ..samples.index import About
from ..samples.writer import Request, SamplesWriter
from .conditioning import from_conditioning, ready_conditioning

LATENT_FLOAT_BYTES = 4


def latent_shape(model: Any, latent: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape that one empty latent of this size has for the model.

    Raises:
        SamplesProblem: the latent has several parts, or marks a part of it to sample.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise SamplesProblem("samples have one latent each, this one has several parts; take one without sound")
    if "noise_mask" in latent:
        raise SamplesProblem("samples are made from noise alone; latent_image must have no noise_mask")
    scales = (latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples[:1]), *scales)
    return tuple(empty.shape)


def sample(
    model: Any, about: About, seed: int, positive: Conditioning, negative: Conditioning | None, callback: Any = None
) -> Tensor:
    """Return one sample as ComfyUI's KSampler gives it, (1, C, ...) on the CPU."""
    empty = torch.zeros(about.latent_shape)
    ready = from_conditioning(positive)
    result = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, seed),
        about.steps,
        about.cfg,
        about.sampler,
        about.scheduler,
        ready,
        ready if negative is None else from_conditioning(negative),  # not computed at cfg 1
        empty,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return result.cpu()


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What a folder of samples is to hold: `about.seeds` samples of each prompt.

    Args:
        about: how they are made.
        prompts: texts, for `encode`.
        positives: ready conditionings instead of prompts.
        negatives: where `about.uses_negative`, one for all of them or one for each of `positives`; none has `encode`
            make it of the empty text.
        encode: makes a CONDITIONING of a text.
    """

    about: About
    prompts: Sequence[str] = ()
    positives: Sequence[Conditioning] = ()
    negatives: Sequence[Conditioning] = ()
    encode: Callable[[str], Sequence[Any]] | None = None

    def requests(self) -> list[Request]:
        """Return the samples in their order."""
        rows = [(text, None) for text in self.prompts] or [("", each.file) for each in self.positives]
        negatives = [each.file for each in self.negatives] if self.about.uses_negative else []
        negatives = negatives if len(negatives) == len(rows) else [negatives[0] if negatives else None] * len(rows)
        return [
            Request(place * self.about.seeds + seed, text, file, negative)
            for place, ((text, file), negative) in enumerate(zip(rows, negatives, strict=True))
            for seed in range(self.about.seeds)
        ]

    @property
    def live(self) -> dict[str, Mapping[str, Any]]:
        """The objects of ready conditionings that no file holds, by file."""
        return {each.file: each.live for each in (*self.positives, *self.negatives) if each.live}


def generate_samples(
    model: Any, folder: Path, order: Order, show: Callable[[str], None] = lambda _: None
) -> TeacherSamples:
    """Make the samples that are not there yet and return all; a finished folder is returned without using the model.

    Args:
        model: the teacher, a model patcher.
        folder: of the samples; an unfinished one is resumed.
        order: what it is to hold.
        show: told how many samples there are, what they take on disk, and the time that is left.

    Raises:
        SamplesProblem: the folder holds other samples or another run writes there, a conditioning cannot be stored, a
            sample came out as NaN, or the disk refuses; what was finished is safe.
        InterruptProcessingException: the user cancelled; what was finished is safe.
    """
    with SamplesWriter(folder, order.about) as writer:
        requests = order.requests()
        missing = writer.missing(requests)
        if missing:
            files = _store_conditionings(writer, order, missing, show)
            size = folder_bytes(folder) + len(missing) * LATENT_FLOAT_BYTES * math.prod(order.about.latent_shape)
            show(f"{_counted(order, requests)}, {len(missing)} to make; {memory_size(size)} in {folder}")
            try:
                _sample_all(model, writer, missing, files, order.live, show)
            except comfy.model_management.InterruptProcessingException:
                show(
                    f"cancelled after {len(writer.finished)} of {counted(len(requests), 'sample')}, run again to go on"
                )
                raise
    return TeacherSamples.open(folder, order.live)


def _store_conditionings(
    writer: SamplesWriter, order: Order, missing: Sequence[Request], show: Callable[[str], None]
) -> dict[int, tuple[str, str | None]]:
    """Return the files of conditionings by sample; all are made before the model takes the text encoder's place."""
    stored: dict[str | int, str] = {}  # by text, or by the place of a ready one

    def encoded(text: str) -> Conditioning:
        assert order.encode is not None
        show(f"encoding prompt {len(stored) + 1}")
        comfy.model_management.throw_exception_if_processing_interrupted()
        return ready_conditioning(order.encode(text), order.about.guidance)

    negatives: list[str | None] = [None]
    if order.about.uses_negative:
        negatives = [writer.put(each) for each in order.negatives or (encoded(""),)]
    files: dict[int, tuple[str, str | None]] = {}
    for each in missing:
        place = each.number // order.about.seeds
        key = each.prompt if order.prompts else place
        if key not in stored:
            stored[key] = writer.put(encoded(key) if isinstance(key, str) else order.positives[key])
        files[each.number] = (stored[key], negatives[place if len(negatives) > 1 else 0])
    return files


def _sample_all(
    model: Any,
    writer: SamplesWriter,
    missing: Sequence[Request],
    files: Mapping[int, tuple[str, str | None]],
    live: Mapping[str, Mapping[str, Any]],
    show: Callable[[str], None],
) -> None:
    preview = latent_preview.prepare_callback(model, writer.about.steps * len(missing))
    start = time.monotonic()

    def read(file: str) -> Conditioning:
        return replace(writer.conditioning(file), live=live.get(file, {}))

    for done, each in enumerate(missing):
        positive, negative = files[each.number]

        def callback(step: int, x0: Tensor, x: Tensor, steps: int, done: int = done) -> None:
            preview(done * steps + step, x0, x, len(missing) * steps)

        latent = sample(
            model,
            writer.about,
            writer.about.seed(each.number),
            read(positive),
            None if negative is None else read(negative),
            callback,
        )
        writer.add(each.number, each.prompt, latent, positive, negative)
        rest = len(missing) - done - 1
        left = time_left((time.monotonic() - start) / (done + 1) * rest)
        whole = len(writer.finished) + rest
        share = percent(len(writer.finished) / whole)
        show(f"{counted(len(writer.finished), 'sample')} finished of {whole}, {share}, {left}")


def describe_samples(samples: TeacherSamples) -> str:
    """Return one line about finished samples."""
    shape = " x ".join(map(str, samples.about.latent_shape))
    return (
        f"{counted(len(samples), 'sample')} of {shape}, {memory_size(folder_bytes(samples.folder))} in {samples.folder}"
    )


def _counted(order: Order, requests: Sequence[Request]) -> str:
    seeds = order.about.seeds
    prompts = counted(len(requests) // seeds, "prompt")
    return counted(len(requests), "sample") + (f" of {prompts}, {seeds} seeds each" if seeds > 1 else f" of {prompts}")


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
