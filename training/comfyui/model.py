"""ComfyUI's model patchers as training jobs take them: their identity, and sessions as teacher or trainee."""

from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
import torch

from ...patching.patcher import host_of, model_fingerprint, runtime_of
from ..samples.folder import OTHER_MODEL, TeacherSamples, check_samples
from .identity import earlier_job_digests, job_digest, model_digest
from .teacher import ComfyTeacher, with_teacher
from .trainee import ComfyTrainee, with_trainee

T = TypeVar("T")


class ComfyModel:
    """A model as `protocols.Model` describes it.

    Args:
        patcher: as it was loaded, with whatever LoRAs it carries.

    Raises:
        ValueError: no host knows the model.
    """

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.host, module = host_of(patcher)
        self.sites = self.host.sites(module)
        self.fingerprint = model_fingerprint(patcher)
        self.device: torch.device = comfy.model_management.get_torch_device()

    @property
    def digest(self) -> str:
        """What distinguishes it from other models."""
        return job_digest(self.patcher)

    @property
    def earlier_digests(self) -> tuple[str, ...]:
        """The digests that earlier versions gave it."""
        return earlier_job_digests(self.patcher)

    def check(self, samples: TeacherSamples) -> str:
        """Return a note on the model and its samples, often empty, after refusing what cannot be trained.

        Raises:
            ValueError: a Linearize node patched the model already, or the samples are another model's.
        """
        if runtime_of(self.patcher) is not None:
            raise ValueError("this model is linearized already; connect the one that goes into the Linearize node")
        found = check_samples(samples, self.host.name, self.fingerprint, model_digest(self.patcher))
        return "" if found == "same" else OTHER_MODEL

    def as_teacher(self, samples: TeacherSamples, work: Callable[[ComfyTeacher], T]) -> T:
        """Load the model and return what `work` returns for it."""
        return with_teacher(self.patcher, samples, work)

    def as_trainee(self, samples: TeacherSamples, work: Callable[[ComfyTrainee], T]) -> T:
        """Load a copy of the model and return what `work` returns for it."""
        return with_trainee(self.patcher, samples, work)
