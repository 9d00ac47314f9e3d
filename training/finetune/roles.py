"""One loaded model in two roles: the teacher as it was loaded, and the student on the same weights.

The runtime's sites and the switch of the changed weights make the difference; a second copy is never loaded.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...attention.runtime.decisions import OUT_OF_MEMORY, SiteSettings
from ...attention.runtime.record import RunRecord
from ...attention.runtime.runtime import Runtime
from ...attention.site_call import SiteCall
from ...attention.specs import SiteSpec
from ...attention.students.learned import StudentParameters
from ..engine.protocols import BlockCall, Observe, Switch
from .blocks import Arguments, Blocks, find_blocks

Forward = Callable[[], Tensor]


class Roles:
    """The teacher and the student of one model.

    Args:
        module: the diffusion model; its blocks are wrapped until `close`.
        runtime: through which its attention calls go; it belongs to this object alone.
    """

    def __init__(self, module: nn.Module, runtime: Runtime) -> None:
        self.switch = Switch()
        self.blocks = Blocks(module, find_blocks(module, runtime.host.site_weights(module)))
        self._runtime = runtime
        self._settings: dict[str, SiteSettings] = {}
        self.be(student=False)

    def install(self, specs: Mapping[str, SiteSpec], parameters: StudentParameters) -> None:
        self._settings = {site: SiteSettings(spec, trained=True) for site, spec in specs.items()}
        self._runtime.parameters = parameters

    def be(self, *, student: bool) -> None:
        """Take a role until the next call."""
        self.switch.is_student = student
        self._runtime.sites = self._settings if student else {}
        self._runtime.observe = None

    @torch.no_grad()
    def watch(self, forward: Forward, observe: Observe) -> Tensor:
        """Return the teacher's velocity, and show `observe` its attention calls."""
        self.be(student=False)
        self._runtime.observe = observe
        try:
            return forward()
        finally:
            self._runtime.observe = None

    def predict(self, forward: Forward, observe: Observe | None) -> Tensor:
        """Return the student's velocity; the model stays the student for the backward pass."""
        self.be(student=True)
        self._runtime.observe = observe
        self._runtime.record = RunRecord(sampled=True)
        try:
            velocity = forward()
        finally:
            self._runtime.observe = None if observe is None else _ignore  # a second run of a block repeats the first
        self._check_declines()
        return velocity

    @torch.no_grad()
    def each_block(self, forward: Forward, show: Callable[[BlockCall], None]) -> Tensor:
        """Return the teacher's velocity, and show every block with sites as it ran."""
        attention: dict[str, Tensor] = {}

        def keep(call: SiteCall) -> None:
            attention[call.site] = call.output.clone()

        def shown(path: str, arguments: Arguments, outputs: tuple[Tensor, ...]) -> None:
            outputs = tuple(each.clone() for each in outputs)  # what follows may write into them

            def run(observe: Observe | None = None) -> tuple[Tensor, ...]:
                self.be(student=True)
                self._runtime.observe = observe
                self._runtime.record = RunRecord(sampled=True)
                try:
                    found = self.blocks.run(path, arguments)
                finally:
                    self.be(student=False)
                    self._runtime.observe = keep
                self._check_declines()
                return found

            sites = self.blocks.sites[path]
            own = {site: attention[site] for site in sites if site in attention}
            show(BlockCall(path, sites, arguments.tensors, outputs, own, run))
            attention.clear()

        self.be(student=False)
        self._runtime.observe, self.blocks.shown = keep, shown
        try:
            return forward()
        finally:
            self._runtime.observe = self.blocks.shown = None

    def close(self) -> None:
        """Restore the model's blocks."""
        self.be(student=False)
        self.blocks.remove()

    def _check_declines(self) -> None:
        for site, reason in self._runtime.record.declined:
            if reason.code == OUT_OF_MEMORY:
                raise torch.OutOfMemoryError(f"{site}: {reason.text}")
            raise ValueError(f"{site} cannot be trained here: {reason.text}")


def _ignore(_: SiteCall) -> None:
    """Ignore a call."""
