"""What training needs of a model. `training/comfyui/` serves it with ComfyUI's models, tests with small ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...attention.hosts.base import Host, Site
from ...attention.site_call import SiteCall
from ...attention.specs import SiteSpec
from ...attention.students.learned import StudentParameters
from ..samples.folder import TeacherSamples

T = TypeVar("T")
Observe = Callable[[SiteCall], None]


@dataclass(slots=True)
class Switch:
    """Whether a model runs as student, with its changes of weights, or as teacher, without."""

    is_student: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """Which noised sample a forward takes; equal draws give equal tensors.

    Args:
        sample: number of the teacher's sample.
        percent: of sampling, above 0 (almost pure noise) and below 1 (almost clean), on the host's own schedule unless
            `unshifted`.
        seed: of the noise.
        negative: with the conditioning of the negative prompt.
        unshifted: the noise level is 1 - percent, whatever the host's schedule does; a host without flow matching,
            whose levels do not go from 1 to 0, keeps its schedule.
    """

    sample: int
    percent: float
    seed: int
    negative: bool = False
    unshifted: bool = False


class Teacher(Protocol):
    """A model as it was loaded, run on noised samples of its own."""

    host: Host
    sites: tuple[Site, ...]
    num_samples: int
    has_negative: bool  # whether the samples were made with a negative prompt that counts

    def watch(self, draw: Draw, observe: Observe) -> Tensor:
        """Run the teacher once and show `observe` every site's call; return the predicted velocity, (B, ...) fp32.

        Gradients are off, but tensors may be saved for a backward pass after a clone.
        """
        ...


class Trainee(Teacher, Protocol):
    """A teacher whose specs, learned parameters and changes of weights can be switched on: then it is the student.

    It stays the student from `predict` until `watch` or `each_block`, because checkpointed blocks run once more in the
    backward pass.
    """

    module: nn.Module  # the diffusion model; its own parameters take no gradients
    switch: Switch  # for the hooks that change weights

    @property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Sites by the path of their block."""
        ...

    @property
    def checkpointing(self) -> bool:
        """Whether only what goes into a block is kept for the backward pass."""
        ...

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None: ...

    def install(self, specs: Mapping[str, SiteSpec], parameters: StudentParameters) -> None:
        """Set what the student runs: specs by site, and the parameters that it reads at every call."""
        ...

    def predict(self, draw: Draw, observe: Observe | None = None) -> Tensor:
        """Return the student's velocity; with gradients where they are enabled, in what `observe` is shown too.

        Raises:
            ValueError: a site could not run the student's spec.
        """
        ...

    def flow_target(self, draw: Draw) -> Tensor:
        """Return the velocity from the clean sample to its noise."""
        ...

    def each_block(self, draw: Draw, show: Callable[["BlockCall"], None]) -> Tensor:
        """Run the teacher once and show every block that has sites as it ran; return the velocity."""
        ...


class Model(Protocol):
    """The model of a training job; it is loaded only while `work` runs."""

    host: Host
    sites: tuple[Site, ...]
    fingerprint: Tensor  # of its base, see `attention/students/fingerprint.py`
    device: torch.device  # on which a student learns

    @property
    def digest(self) -> str:
        """What distinguishes it from other models; jobs are named after it."""
        ...

    @property
    def earlier_digests(self) -> tuple[str, ...]:
        """The digests that earlier versions gave it."""
        ...

    def as_teacher(self, samples: TeacherSamples, work: Callable[[Teacher], T]) -> T:
        """Load the model and return what `work` returns for it."""
        ...

    def as_trainee(self, samples: TeacherSamples, work: Callable[[Trainee], T]) -> T:
        """Load a copy of the model and return what `work` returns for it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """One transformer block on the teacher's inputs.

    Args:
        path: of the block.
        sites: whose attention calls it issues.
        inputs: the tensors that the block was given.
        outputs: what the teacher's block returned.
        attention: by site, what the teacher's attention returned, (B, H, N, D).
        run: the same block as student, on the same inputs; with gradients where they are enabled. The observer is
            shown its attention calls.
    """

    path: str
    sites: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attention: Mapping[str, Tensor]
    run: Callable[[Observe | None], tuple[Tensor, ...]]
