"""One candidate of one site while it learns: parameters, optimiser, loss on a call of the teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...attention.gpu.mapped import TRITON
from ...attention.hosts.base import Site
from ...attention.kinds.kind import Learned
from ...attention.kinds.linear import TORCH
from ...attention.kinds.mapped import mapped_queries
from ...attention.kinds.output_map import map_outputs
from ...attention.layout import TokenLayout
from ...attention.runtime.backends import Backend, CallShape, choose_backend
from ...attention.site_call import SiteCall
from ...attention.specs import HybridSpec, LinearSpec, MappedSpec, SiteSpec
from ...attention.students.learned import new_maps, new_parameters
from ..engine.losses import energies, score_loss, squared_loss, value_loss
from ..engine.optimizers import make_optimizer, optimizer_state, restore_optimizer
from ..engine.recipe import TransferRecipe
from .scores import NUM_SCORE_QUERIES, scores_and_products

ENGINES = {"torch": TORCH, "triton": TRITON}
LOSSES = {"value": value_loss, "squared": squared_loss}


class SiteTrainer(nn.Module):
    """A candidate: the spec of a site, and what it learns of the teacher's outputs.

    Args:
        site, spec: of the candidate.
        recipe: loss, learning rate, clipping.
        device: of the parameters; they are fp32.

    Raises:
        ValueError: the feature map cannot have that many features, or "score" is to train a kind without any.
    """

    def __init__(self, site: Site, spec: SiteSpec, recipe: TransferRecipe, device: torch.device) -> None:
        super().__init__()
        self.site, self.spec, self.recipe = site, spec, recipe
        self.matrices: Tensor | None = None
        if spec.has_maps:
            self.phi_q, self.phi_k = new_maps(spec, site.num_heads, site.head_dim)
        self._names = tuple(spec.learned_shapes(site.num_heads))
        for name, start in new_parameters(spec, site.num_heads).items():
            self.register_parameter(name, nn.Parameter(start))
        self.to(device)
        parameters = list(self.parameters())
        self.optimizer = None
        if parameters and recipe.updates:
            groups = [{"params": parameters, "lr": recipe.learning_rate}]
            self.optimizer = make_optimizer("adamw", groups, weight_decay=0.0)

    def learned(self) -> Learned:
        """Return the parameters as backends take them."""
        maps = (self.phi_q, self.phi_k) if self.spec.has_maps else None
        return Learned(maps=maps, **{name: self.get_parameter(name) for name in self._names})

    def output(self, call: SiteCall) -> Tensor:
        """Return the candidate's output, `matrices` included, on the teacher's query, key and value, (B, H, N, D).

        Raises:
            ValueError: the backend that the recipe names, or every backend, refuses the call.
        """
        backend, facts = self._backend(call)
        inputs = (call.query, call.key, call.value)
        output = backend.run(*inputs, facts, scale=call.scale, learned=self.learned(), memory=None)
        return output if self.matrices is None else map_outputs(output, facts.layout, self.matrices)

    def some_outputs(self, call: SiteCall, rows: Tensor) -> Tensor:
        """Return the rows of `output` that stand for some grid tokens, without `matrices`; errors as there.

        Linear and hybrid attention compute no others, which is what makes few queries cheap.
        """
        backend, facts = self._backend(call)
        learned = self.learned()
        if backend.name in ENGINES and isinstance(self.spec, LinearSpec | HybridSpec) and learned.maps:
            inputs = (call.query.index_select(2, rows), call.key, call.value)
            options = {"scale": call.scale, "engine": ENGINES[backend.name]}
            return mapped_queries(*inputs, facts.layout, self.spec, learned.maps, **options)
        inputs = (call.query, call.key, call.value)
        output = backend.run(*inputs, facts, scale=call.scale, learned=learned, memory=None)
        return output.index_select(2, rows)

    def _backend(self, call: SiteCall) -> tuple[Backend, CallShape]:
        assert isinstance(call.layout, TokenLayout)
        batch, heads, tokens, size = call.query.shape
        learns = torch.is_grad_enabled() and self.optimizer is not None
        shape = (batch, heads, tokens, size)
        facts = CallShape(self.spec, call.layout, shape, call.query.dtype, call.query.device, learns)
        backend, reasons = choose_backend(facts, self.recipe.backend)
        if backend is None:
            raise ValueError(f"{self.site.id}: {'; '.join(map(str, reasons))}")
        return backend, facts

    def backward(self, call: SiteCall, rows: Tensor) -> float:
        """Add the gradient of the loss on some queries; return the loss.

        Args:
            call: of the teacher, tensors without gradients.
            rows: indices of the queries that count.
        """
        if self.recipe.loss == "score" and isinstance(self.spec, MappedSpec):
            loss = score_loss(*scores_and_products(call, self.spec, self.learned(), rows[:NUM_SCORE_QUERIES]))
        else:
            compare = LOSSES.get(self.recipe.loss, value_loss)  # a kind without scores falls back to its values
            loss = compare(self.some_outputs(call, rows), call.output.index_select(2, rows))
        loss.backward()
        return float(loss.detach())

    def step(self, rate: float) -> None:
        """Take one step, `rate` times the learning rate, and forget the gradients; none where they are not finite."""
        if self.optimizer is None:
            return
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.recipe.clip)
        if bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * self.recipe.learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def energies(self, call: SiteCall) -> tuple[float, float]:
        """Return the energy that the candidate misses on the grid's queries, and the teacher's there."""
        rows = call.grid_tokens()
        return energies(self.output(call).index_select(2, rows), call.output.index_select(2, rows))

    def state(self) -> dict[str, Tensor]:
        """Return parameters and what the optimiser remembers."""
        state = {f"parameters.{name}": value.detach() for name, value in self.named_parameters()}
        if self.optimizer is not None:
            state |= {f"optimizer.{name}": value for name, value in optimizer_state(self.optimizer).items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(state[f"parameters.{name}"])
        if self.optimizer is not None:
            kept = {name: value for name, value in state.items() if name.startswith("optimizer.")}
            restore_optimizer(self.optimizer, {name.removeprefix("optimizer."): value for name, value in kept.items()})

    def result(self) -> dict[str, Tensor]:
        """Return the parameters as a student's file names them, on the CPU."""
        learned = {name: value.detach().cpu().clone() for name, value in self.named_parameters()}
        return learned if self.matrices is None else {**learned, "output.weight": self.matrices}
