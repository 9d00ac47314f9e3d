"""Makes a teacher's samples with ComfyUI's own sampler, and turns CONDITIONING into what a file holds, and back.

Where the samples lie and how they survive a kill is known to `samples_writer.py`.
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

from .conditioning import CROSS_ATTN, Conditioning, SamplesProblem, can_store
from .sample_index import About
from .samples import TeacherSamples
from .samples_writer import SamplesWriter, Wanted

GUIDANCE = "guidance"
# where and when an entry counts; samples are made of entries that count everywhere, always
PARTIAL = ("area", "mask", "mask_strength", "set_area_to_bounds", "strength", "start_percent", "end_percent",
           "clip_start_percent", "clip_end_percent", "timestep_start", "timestep_end")  # fmt: skip
LATENT_FLOAT_BYTES = 4


def to_conditioning(entries: Sequence[Any]) -> Conditioning:
    """Return a CONDITIONING of one entry as tensors on the CPU and plain values.

    Raises:
        SamplesProblem: it has no entry or several, or holds what no file can, such as a ControlNet or a mask.
    """
    if len(entries) != 1:
        raise SamplesProblem(
            f"samples are made of a conditioning with one entry, this one has {len(entries)}; leave out nodes that "
            "combine conditionings or schedule them"
        )
    cross_attn, options = entries[0][0], entries[0][1]
    tensors = {name: value.detach().cpu() for name, value in options.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    refused = [name for name in options if name in (*PARTIAL, CROSS_ATTN) or not can_store(options[name])]
    refused += [CROSS_ATTN] if cross_attn is not None and not isinstance(cross_attn, Tensor) else []
    if refused:
        raise SamplesProblem(
            f"samples cannot be made of a conditioning with {refused[0]}; leave out the node that puts it there "
            "(ControlNet, mask, area, hook, reference picture or the like)"
        )
    return Conditioning(None if cross_attn is None else cross_attn.detach().cpu(), tensors, values)


def from_conditioning(conditioning: Conditioning) -> list[Any]:
    """Return it as ComfyUI's CONDITIONING; its tensors are normal ones, which autograd can save."""
    with torch.inference_mode(False):
        tensors = {name: _normal(tensor) for name, tensor in conditioning.tensors.items()}
        cross_attn = None if conditioning.cross_attn is None else _normal(conditioning.cross_attn)
    return [[cross_attn, {**tensors, **conditioning.values}]]


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def ready_conditioning(entries: Sequence[Any], guidance: float) -> Conditioning:
    """Return a CONDITIONING as samples are made of it: with FLUX's guidance, unless it has its own or `guidance` is 0.

    Raises:
        SamplesProblem: as in `to_conditioning`.
    """
    found = to_conditioning(entries)
    if not guidance or GUIDANCE in found.values:
        return found
    return replace(found, values={**found.values, GUIDANCE: guidance})


def latent_shape(model: Any, latent: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape that one empty latent of this size has for the model.

    Raises:
        SamplesProblem: the latent has several parts, or says which part of it is to be painted.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise SamplesProblem("samples have one latent each, this one has several parts; take one without sound")
    if "noise_mask" in latent:
        raise SamplesProblem("samples are painted from noise alone; latent_image must have no noise_mask")
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
        negative: for all of them, where `about.uses_negative`; None has `encode` make it of the empty text.
        encode: makes a CONDITIONING of a text.
    """

    about: About
    prompts: Sequence[str] = ()
    positives: Sequence[Conditioning] = ()
    negative: Conditioning | None = None
    encode: Callable[[str], Sequence[Any]] | None = None

    def wanted(self) -> list[Wanted]:
        """Return the samples in their order."""
        negative = self.negative.file if self.negative and self.about.uses_negative else None
        rows = [(text, None) for text in self.prompts] or [("", each.file) for each in self.positives]
        return [
            Wanted(place * self.about.seeds + seed, text, file, negative)
            for place, (text, file) in enumerate(rows)
            for seed in range(self.about.seeds)
        ]


def generate_samples(
    model: Any, folder: Path, order: Order, show: Callable[[str], None] = lambda _: None
) -> TeacherSamples:
    """Make the samples that are not there yet and return all; a finished folder is returned without using the model.

    Args:
        model: the teacher, a model patcher.
        folder: of the samples; an unfinished one is gone on with.
        order: what it is to hold.
        show: told how many samples there are, what they take on disk, and the time that is left.

    Raises:
        SamplesProblem: the folder holds other samples or another run writes there, a conditioning cannot be stored, a
            sample came out as NaN, or the disk refuses; what was finished is safe.
        InterruptProcessingException: the user cancelled; what was finished is safe.
    """
    with SamplesWriter(folder, order.about) as writer:
        wanted = order.wanted()
        missing = writer.missing(wanted)
        if missing:
            files = _store_conditionings(writer, order, missing, show)
            size = folder_bytes(folder) + len(missing) * LATENT_FLOAT_BYTES * math.prod(order.about.latent_shape)
            show(f"{_counted(order, wanted)}, {len(missing)} to make; {describe_bytes(size)} in {folder}")
            _sample_all(model, writer, missing, files, show)
    return TeacherSamples.open(folder)


def _store_conditionings(
    writer: SamplesWriter, order: Order, missing: Sequence[Wanted], show: Callable[[str], None]
) -> dict[int, tuple[str, str | None]]:
    """Return the files of conditionings by sample; all are made before the model takes the text encoder's place."""
    stored: dict[str | int, str] = {}  # by text, or by the place of a ready one

    def encoded(text: str) -> Conditioning:
        assert order.encode is not None
        show(f"encoding prompt {len(stored) + 1}")
        comfy.model_management.throw_exception_if_processing_interrupted()
        return ready_conditioning(order.encode(text), order.about.guidance)

    negative = None
    if order.about.uses_negative:
        negative = writer.put(encoded("") if order.negative is None else order.negative)
    files: dict[int, tuple[str, str | None]] = {}
    for each in missing:
        key = each.prompt if order.prompts else each.number // order.about.seeds
        if key not in stored:
            stored[key] = writer.put(encoded(key) if isinstance(key, str) else order.positives[key])
        files[each.number] = (stored[key], negative)
    return files


def _sample_all(
    model: Any,
    writer: SamplesWriter,
    missing: Sequence[Wanted],
    files: Mapping[int, tuple[str, str | None]],
    show: Callable[[str], None],
) -> None:
    preview = latent_preview.prepare_callback(model, writer.about.steps * len(missing))
    start = time.monotonic()
    for done, each in enumerate(missing):
        positive, negative = files[each.number]

        def callback(step: int, x0: Tensor, x: Tensor, steps: int, done: int = done) -> None:
            preview(done * steps + step, x0, x, len(missing) * steps)

        latent = sample(
            model,
            writer.about,
            writer.about.seed(each.number),
            writer.conditioning(positive),
            None if negative is None else writer.conditioning(negative),
            callback,
        )
        writer.add(each.number, each.prompt, latent, positive, negative)
        rest = len(missing) - done - 1
        left = describe_seconds((time.monotonic() - start) / (done + 1) * rest)
        show(f"{many(len(writer.finished), 'sample')} finished, {rest} to make, {left}")


def describe_samples(samples: TeacherSamples) -> str:
    """Return one line about finished samples."""
    shape = " x ".join(map(str, samples.about.latent_shape))
    return (
        f"{many(len(samples), 'sample')} of {shape}, {describe_bytes(folder_bytes(samples.folder))} in {samples.folder}"
    )


def _counted(order: Order, wanted: Sequence[Wanted]) -> str:
    seeds = order.about.seeds
    prompts = many(len(wanted) // seeds, "prompt")
    return many(len(wanted), "sample") + (f" of {prompts}, {seeds} seeds each" if seeds > 1 else f" of {prompts}")


def many(count: int, word: str) -> str:
    """Return a number with its word."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def folder_bytes(folder: Path) -> int:
    """Return what the files of a folder take, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe_bytes(count: int) -> str:
    """Return a size in MiB or GiB."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def describe_seconds(seconds: float) -> str:
    """Return the time that is left, roughly."""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
