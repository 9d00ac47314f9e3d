"""A teacher's samples on disk, `linearize/samples/1`, and how they are read.

`about.json` says how the samples were made and `index.jsonl` lists them, one line each; latents and conditionings are
safetensors files beside them. `writer.py` writes them, `training/comfyui/sampling.py` has a model make them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...attention.shown import one_line
from ...attention.students.fingerprint import Match, distance, match
from ...attention.students.tensor_values import content_sha256
from .conditioning import Conditioning, needs_control_net, read_conditioning
from .files import NODE, SamplesProblem, load_tensors
from .index import ABOUT, About, Sample, has_files, read_about, read_index

OTHER_MODEL = (
    "the samples are of another model than this one: a fine-tune or merge of it, the same weights in another dtype, or "
    "other LoRAs or noise levels; samples of its own are better teachers"
)
EMPTY: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
LATENT = "samples"  # name of the tensor in a latent's file, as in ComfyUI's LATENT


class TeacherSamples:
    """A folder of samples, opened; tensors are read when they are asked for.

    Args:
        folder: that holds them.
        about: how they were made.
        entries: the samples, each at the place of its number.
        live: by file of a conditioning, the objects that it needs and no file holds, such as a ControlNet.
    """

    def __init__(
        self, folder: Path, about: About, entries: tuple[Sample, ...], live: Mapping[str, Mapping[str, Any]] = EMPTY
    ) -> None:
        self.folder = folder
        self.about = about
        self.entries = entries
        self.live = live

    @classmethod
    def open(cls, folder: Path, live: Mapping[str, Mapping[str, Any]] = EMPTY) -> "TeacherSamples":
        """Return the samples of a folder, finished or not; a last line that was torn by a kill does not count.

        Raises:
            SamplesProblem: there is no such folder, it holds no sample or other things, it is damaged, or a file that
                its index lists is missing.
        """
        folder = Path(folder)
        if not (folder / ABOUT).is_file():
            raise SamplesProblem(f"there are no teacher samples in {folder}; make them with {NODE}")
        about = read_about(folder)
        found, _ = read_index(folder, about)
        if not found:
            raise SamplesProblem(f"no sample in {folder} is finished; run {NODE} again")
        lost = [number for number in range(max(found) + 1) if number not in found]
        lost += [number for number, sample in found.items() if not has_files(folder, sample)]
        if lost:
            raise SamplesProblem(f"sample {min(lost)} in {folder} lost its files; run {NODE} again to make it anew")
        return cls(folder, about, tuple(found[number] for number in range(len(found))), live)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_negative(self) -> bool:
        """Whether the samples were made with a negative prompt that counts."""
        return self.about.uses_negative and all(sample.negative is not None for sample in self.entries)

    @property
    def digest(self) -> str:
        """sha256 of what was made and how, the contents of all tensors included; it does not depend on the place."""
        digest = hashlib.sha256(json.dumps(self.about.to_json(), sort_keys=True).encode())
        for sample in self.entries:
            digest.update(sample.line())
        return digest.hexdigest()

    def latent(self, number: int) -> Tensor:
        """Return a sample as the sampler gave it (ComfyUI's LATENT "samples"), (1, C, ...) fp32 on the CPU.

        Raises:
            ValueError: the file cannot be read, or is not the one that the index lists; one sentence.
        """
        sample = self.entries[number]
        tensors, _ = load_tensors(self.folder / sample.latent)
        latent = tensors.get(LATENT)
        if latent is None or tuple(latent.shape) != sample.shape or content_sha256(tensors) != sample.sha256:
            raise self._changed(sample.latent)
        return latent.float()

    def conditioning(self, number: int, negative: bool = False) -> Conditioning:
        """Return the conditioning of a sample, tensors on the CPU.

        Raises:
            ValueError: it has no negative one, or as in `latent`.
        """
        file = self.entries[number].negative if negative else self.entries[number].positive
        if file is None:
            raise SamplesProblem(f"sample {number} in {self.folder} has no negative conditioning, its cfg is 1")
        conditioning = read_conditioning(self.folder / file)
        if conditioning.file != file:
            raise self._changed(file)
        return replace(conditioning, live=self.live.get(file, {}))

    def control_nets(self) -> list[Mapping[str, Any]]:
        """Return what `live` has for each conditioning with a ControlNet.

        Raises:
            SamplesProblem: one is not at hand. ValueError: a file cannot be read.
        """
        files = dict.fromkeys(file for each in self.entries for file in (each.positive, each.negative) if file)
        needing = [file for file in files if needs_control_net(self.folder / file)]
        if any(file not in self.live for file in needing):
            raise SamplesProblem(
                f"the samples in {self.folder} were made with a ControlNet, which no folder holds; run {NODE} with the "
                "same conditionings in the same graph, and train in one process"
            )
        return [self.live[file] for file in needing]

    def _changed(self, file: str) -> SamplesProblem:
        return SamplesProblem(
            f"{file} in {self.folder} is not the file that was written there; delete it, and run {NODE} again to make "
            "its samples anew"
        )


def check_samples(samples: TeacherSamples, host_name: str, fingerprint: Tensor, model: str = "") -> Match:
    """Return whether samples are of the "same" model or of one that is its "fine-tune", in the sense of OTHER_MODEL.

    Args:
        samples: of any model.
        host_name, fingerprint: of the model that is to be trained.
        model: its digest; where one is not known, only the norm weights of the fingerprint are compared.

    Raises:
        SamplesProblem: they are of another host, or of an unrelated model.
    """
    about = samples.about
    base = one_line(about.base_model or "an unnamed model")
    if about.host != host_name:
        raise SamplesProblem(
            f"the samples in {samples.folder} are of host {one_line(about.host)} ({base}), this model is "
            f"{host_name}; make its own with {NODE}"
        )
    found = match(fingerprint, about.fingerprint)
    if found == "other":
        raise SamplesProblem(
            f"the samples in {samples.folder} are of another model, {base} (norms "
            f"{distance(fingerprint, about.fingerprint):.0%} apart); make this model's own with {NODE}"
        )
    is_other = bool(model and about.model and model != about.model)
    return "fine-tune" if is_other else found
