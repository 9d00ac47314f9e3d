"""Gradients through every family with its sites linearized: those of finite differences, checkpointed or not.

ComfyUI's blocks write into their inputs and into tensors that a backward pass needs; `finetune/blocks.py` keeps both.
"""

import pytest
import torch
from families import collect, seeded

from linearize.attention.hosts import HOSTS
from linearize.attention.kinds.kind import Learned
from linearize.attention.memory import LongLived
from linearize.attention.runtime.override import OVERRIDE_KEY, AttentionOverride, model_call_wrapper
from linearize.attention.runtime.runtime import RUNTIME_KEY, Runtime
from linearize.attention.specs import LinearSpec
from linearize.attention.students.learned import StudentParameters, new_maps
from linearize.training.engine.schedule import generator
from linearize.training.finetune.deltas import attach, new_deltas, projections
from linearize.training.finetune.roles import Roles

SPEC = LinearSpec("linfusion")
# parts that ComfyUI 0.30 computes without gradients, or whose text encoder writes into saved tensors
WITHOUT = {"cosmos predict2", "cosmos with long patches", "anima", "joyimage", "minimax h3", "wan dancer"}
FAMILIES = [family for family in collect() if family.name not in WITHOUT]


class Training:
    """A family's tiny model as student, with changes of its projections that are not 0."""

    def __init__(self, family):
        self.family, self.model = family, seeded(family.build())
        self.host = next(host for host in HOSTS if host.name == family.host)
        self.inputs = family.inputs(family.cases["plain"])
        self.runtime = Runtime(self.host, {}, LongLived())
        self.roles = Roles(self.model, self.runtime)
        sites, weights = self.host.sites(self.model), self.host.site_weights(self.model)
        maps = StudentParameters({s.id: Learned(maps=new_maps(SPEC, s.num_heads, s.head_dim)) for s in sites})
        maps.requires_grad_(True)
        sizes = projections(self.model, (path for site in sites for path in weights[site.id]))
        deltas = new_deltas(sizes, "lora", 2, 0)
        for path, delta in deltas.items():
            delta.up.data = torch.randn(delta.up.shape, generator=generator(path)) * 0.02
        self.roles.install({site.id: SPEC for site in sites}, maps)
        attach(self.model, deltas, self.roles.switch)
        self.parameters = [*maps.parameters(), *(each for delta in deltas.values() for each in delta.parameters())]

    def loss(self):
        options = {
            OVERRIDE_KEY: AttentionOverride(),
            RUNTIME_KEY: self.runtime,
            "wrappers": {self.host.wrapped: {"linearize": [model_call_wrapper]}},
        }
        output = self.roles.predict(lambda: self.family.forward(self.model, self.inputs, options), None)
        output = output if isinstance(output, torch.Tensor) else output[0]
        return (output.double() * torch.randn(output.shape, generator=generator("weights"))).sum()

    def gradient(self, checkpointing):
        self.roles.blocks.checkpointing = checkpointing
        for each in self.parameters:
            each.grad = None
        self.loss().backward()
        return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in self.parameters]

    @torch.no_grad()
    def difference(self, direction, step):
        """Return the slope of the loss along a direction."""
        losses = []
        for sign in (step, -2 * step, step):
            for each, along in zip(self.parameters, direction, strict=True):
                each += sign * along
            losses.append(float(self.loss()))
        return (losses[0] - losses[1]) / (2 * step)


@pytest.fixture
def training(comfy, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", True)
    return Training


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_gradients_are_those_of_finite_differences(training, family):
    student = training(family)
    before = [each.clone() for each in student.model.parameters()]
    plain, checkpointed = student.gradient(False), student.gradient(True)
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    length = sum(float(each.square().sum()) for each in plain) ** 0.5
    slopes = [student.difference([each / length for each in plain], step) / length for step in (1e-2, 3e-3)]
    assert min(abs(slope - 1) for slope in slopes) < 5e-3, slopes
    assert all(torch.equal(old, new) for old, new in zip(before, student.model.parameters(), strict=True))
    found = {site for sites in student.roles.blocks.sites.values() for site in sites}
    left = [site for site in family.sites if site not in found]
    assert not left, "every site lies in a block"


def test_blocks_get_their_own_forward_back(training):
    family = FAMILIES[0]
    student = training(family)
    paths = list(student.roles.blocks.sites)
    assert all("forward" in student.model.get_submodule(path).__dict__ for path in paths)
    student.roles.close()
    assert not any("forward" in student.model.get_submodule(path).__dict__ for path in paths)
