"""How the demo's models are trained: optimisers, average, stages, checkpoints, loss curve.

`lake/train.py` and `clips/train.py` say on what, and for how long.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MATRIX_RATE, OTHER_RATE = 2.4e-3, 1.5e-3


class Stage(Protocol):
    """Some steps of training; the learning rate goes from `start` to `end` times its full value."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


class FlowTrainer:
    """Model, averaged model, optimisers and step number.

    Args:
        make: returns a new model, which has `initialise(seed)`; the matrices of its blocks are trained by Muon.
        keep: largest share of the average that a step leaves.
        seed: of the weights and, with the step number, of all data and noise.
    """

    def __init__(self, make: Callable[[], Any], keep: float, seed: int, device: str) -> None:
        self.seed, self.step, self.device, self._keep = seed, 0, device, keep
        self.model, self.average = make(), make()
        self.model.initialise(seed)
        self.average.load_state_dict(self.model.state_dict())
        self.model.to(device)
        self.average.to(device).requires_grad_(False)
        blocks = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "blocks." in n]
        others = [p for p in self.model.parameters() if not any(p is block for block in blocks)]
        self.optimisers = [
            torch.optim.Muon(blocks, lr=MATRIX_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def loss(self, stage: Any, generator: torch.Generator) -> Tensor:
        """Return the loss of a step on data and noise of its own."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """Return what a checkpoint holds beside the optimisers."""
        return {"model": self.model, "average": self.average}

    def restore(self, states: Mapping[str, dict[str, Tensor]]) -> None:
        """Take back the states of `networks`."""
        for name, network in self.networks().items():
            network.load_state_dict(states[name])

    def advance(self, stage: Stage, done: int) -> float:
        """Take one step, the `done`-th of its stage; return the loss."""
        loss = self.loss(stage, torch.Generator().manual_seed(self.seed * 1_000_003 + self.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = (stage.start + (stage.end - stage.start) * done / stage.steps) * min(1.0, (done + 1) / 40)
        for optimiser, full in zip(self.optimisers, (MATRIX_RATE, OTHER_RATE), strict=True):
            optimiser.param_groups[0]["lr"] = full * rate
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        keep = min(self._keep, (self.step + 1) / (self.step + 12))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        """Write everything that training needs to go on, as one safetensors file."""
        tensors = {f"{group}.{name}": tensor for group, network in self.networks().items()
                   for name, tensor in network.state_dict().items()}  # fmt: skip
        for index, optimiser in enumerate(self.optimisers):
            for number, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{index}.{number}.{name}": torch.as_tensor(v) for name, v in state.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"step": str(self.step), "seed": str(self.seed)})
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote."""
        with safe_open(path, "pt") as file:
            self.step, self.seed = int(file.metadata()["step"]), int(file.metadata()["seed"])
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(path, self.device).items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        self.restore(groups)
        for index, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, tensor in groups.get("optimiser", {}).items():
                which, number, name = key.split(".", 2)
                if int(which) == index:
                    states.setdefault(int(number), {})[name] = tensor
            optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})


def train_stages(trainer: FlowTrainer, folder: Path, stages: Sequence[Stage]) -> None:
    """Train to the end of the stages, saving every 100 steps; a second call goes on where the first stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.safetensors", folder / "training.jsonl"
    if checkpoint.exists():
        trainer.load(checkpoint)
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < trainer.step), encoding="utf-8")
    first = 0
    for stage in stages:
        start = time.monotonic()
        while first <= trainer.step < first + stage.steps:
            loss = trainer.advance(stage, trainer.step - first)
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {trainer.step}; delete {folder} and lower the rates")
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.step - 1, "stage": stage.name, "loss": round(loss, 5)}) + "\n")
            if trainer.step % 100 == 0 or trainer.step == first + stage.steps:
                trainer.save(checkpoint)
                print(
                    f"{stage.name}: step {trainer.step}, loss {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True
                )
        first += stage.steps


def write_curve(folder: Path, path: Path) -> None:
    """Save the loss of every step of a training folder and its running mean, coloured by stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        steps = [row["step"] for row in rows if row["stage"] == stage]
        losses = torch.tensor([row["loss"] for row in rows if row["stage"] == stage])
        window = min(25, len(losses))
        mean = losses.unfold(0, window, 1).mean(1)
        (line,) = axis.plot(steps, losses, alpha=0.25, linewidth=0.6)
        axis.plot(steps[window - 1 :], mean, color=line.get_color(), linewidth=1.4, label=stage)
    axis.set(xlabel="step", ylabel="velocity error (mean square)", yscale="log")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
