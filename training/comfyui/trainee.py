"""ComfyUI's models as trainees: a copy of the model, loaded whole, that is teacher and student in turns.

The copy comes from the model's own loader with its LoRAs on it; the model that the user wired is never touched.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import comfy.model_management
import torch
from torch import Tensor

from ...attention.specs import SiteSpec
from ...attention.students.learned import StudentParameters
from ...patching.patcher import trainable
from ..engine.protocols import BlockCall, Draw, Observe
from ..finetune.roles import Forward, Roles
from ..samples.folder import TeacherSamples
from .teacher import ComfyTeacher, run_session

T = TypeVar("T")


class ComfyTrainee(ComfyTeacher):
    """A trainee as `protocols.Trainee` describes it, inside a run of `with_trainee`."""

    def __init__(
        self, guider: Any, runtime: Any, options: dict[str, Any], samples: TeacherSamples, device: Any
    ) -> None:
        super().__init__(guider, runtime, options, samples, device)
        self.module = guider.inner_model.diffusion_model
        self.latent_format = guider.inner_model.latent_format
        self._roles = Roles(self.module, runtime)
        self.switch, self.blocks = self._roles.switch, self._roles.blocks.sites

    @property
    def checkpointing(self) -> bool:
        return self._roles.blocks.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self._roles.blocks.checkpointing = value

    def install(self, specs: Mapping[str, SiteSpec], parameters: StudentParameters) -> None:
        self._roles.install(specs, parameters)

    def watch(self, draw: Draw, observe: Observe) -> Tensor:
        return self._roles.watch(self._forward(draw), observe)

    def predict(self, draw: Draw, observe: Observe | None = None) -> Tensor:
        return self._roles.predict(self._forward(draw), observe)

    def each_block(self, draw: Draw, show: Callable[[BlockCall], None]) -> Tensor:
        return self._roles.each_block(self._forward(draw), show)

    def flow_target(self, draw: Draw) -> Tensor:
        noised, sigma, clean = self.noised(draw)
        return (noised - clean) / sigma

    @torch.no_grad()
    def clean_picture(self, draw: Draw) -> Tensor:
        """Return the clean latent that the student sees in a noised one, in the model's own scale."""
        noised, sigma, _ = self.noised(draw)
        return noised - self.predict(draw) * sigma

    def close(self) -> None:
        """Give the model's blocks back as they were."""
        self._roles.close()

    def _forward(self, draw: Draw) -> Forward:
        noised, sigma, _ = self.noised(draw)
        return lambda: self._velocity(draw, noised, sigma, self._options)


def with_trainee(model: Any, samples: TeacherSamples, work: Callable[[ComfyTrainee], T]) -> T:
    """Call `work` with a copy of a model and its samples, return what it returns, and drop the copy.

    Args:
        model: a model patcher, as it was loaded, with whatever LoRAs it carries.
        samples: made by it.
        work: called outside inference mode, with gradients enabled.

    Raises:
        ValueError: the model cannot be copied, or no host knows it.
    """
    results: list[T] = []
    with torch.inference_mode(False), torch.enable_grad():
        patched, runtime = trainable(model)

        def run(guider: Any, options: dict[str, Any]) -> None:
            trainee = ComfyTrainee(guider, runtime, options, samples, patched.load_device)
            try:
                results.append(work(trainee))
            finally:
                trainee.close()

        with differentiable():
            run_session(patched, runtime, samples, run)
    return results[0]


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Make ComfyUI's models use the versions of their operations that have gradients."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before
