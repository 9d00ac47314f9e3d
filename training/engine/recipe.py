"""How a student is trained, as data: one frozen dataclass per method, checked on construction.

Files call the method "stage".
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...attention.checks import MOST_SEED, MOST_TOKENS, check_boolean, check_choice, check_number, check_whole
from ...attention.runtime.backends import AUTO, BACKENDS
from .optimizers import AVERAGING, OPTIMIZERS

VALUE_LOSSES = ("value", "squared", "score")
TRAINABLES = ("lora", "full", "maps")
NOISE_LEVELS = ("middle", "even", "unshifted")
MOST_UPDATES = 10**7
MOST_DRAWS = 10**4
MOST_RANK = 4096
MOST_WEIGHT = 1e6  # of a loss, a rate or a norm


@dataclass(frozen=True, slots=True)
class TransferRecipe:
    """Stage 1: feature maps, pooling weights and biases of means learn the teacher's attention, site by site.

    Args:
        updates: of every candidate.
        learning_rate: of AdamW, at its highest; it warms up over `warmup` updates and falls along half a cosine.
        loss: "value" compares attention outputs (L1, as Attention Surgery does), "squared" their squares, "score"
            compares attention weights.
        queries: of each call that are trained on, drawn anew each time; 0 takes all. Keys are always all.
        replay: forwards of the teacher that are kept in host memory and trained on in turns; 1 keeps none.
        repeats: updates per forward of the teacher.
        replay_bytes: host memory for what is kept; where it is short, fewer forwards are.
        held_out: draws on which errors are measured.
        output_draws: draws of which the matrices behind the attention are made in the end (`closed_form.py`); 0 makes
            none.
        clip: largest norm of a candidate's gradient.
        backend: that computes the student; `auto`, or a name.

    Raises:
        ValueError: a value is out of range; the sentence names it.
    """

    method: ClassVar[str] = "transfer"
    updates: int = 2000
    learning_rate: float = 0.01
    loss: str = "value"
    queries: int = 1024
    replay: int = 1
    repeats: int = 1
    replay_bytes: int = 4 * 2**30
    held_out: int = 8
    output_draws: int = 32
    warmup: int = 20
    clip: float = 1.0
    seed: int = 0
    backend: str = AUTO

    def __post_init__(self) -> None:
        for name, least, most in (
            ("updates", 0, MOST_UPDATES), ("queries", 0, MOST_TOKENS), ("replay", 1, MOST_DRAWS),
            ("repeats", 1, MOST_DRAWS), ("held_out", 1, MOST_DRAWS), ("output_draws", 0, MOST_DRAWS),
            ("warmup", 0, MOST_UPDATES), ("replay_bytes", 0, 2**50), ("seed", 0, MOST_SEED),
        ):  # fmt: skip
            check_whole(name, getattr(self, name), least, most)
        for name in ("learning_rate", "clip"):
            check_number(name, getattr(self, name), MOST_WEIGHT, above_zero=True)
        check_choice("loss", self.loss, VALUE_LOSSES)
        check_choice("backend", self.backend, (AUTO, *BACKENDS))

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it."""
        return {"stage": self.method, **asdict(self)}


@dataclass(frozen=True, slots=True)
class FinetuneRecipe:
    """Stages 2 and 3: changes of weights join, first block by block on the teacher's inputs, then end to end.

    Args:
        block_updates: with each block on the teacher's inputs.
        updates: end to end.
        trainables: beside maps, pooling weights and matrices, which always learn: "lora" changes the weights of the
            converted sites' projections by matrices of low rank, "full" by whole ones, "maps" not at all.
        rank: of "lora".
        map_rate, delta_rate: learning rates of maps and of changes of weights; `prodigy` finds its own instead.
        flow: weight of the distance to the flow-matching target, from the clean sample to its noise.
        prediction: weight of the distance to the teacher's velocity.
        attention: weight of the distance to the teacher's attention outputs on every `attention_every`-th
            converted site.
        noise_levels: end to end, drawn around the "middle" of the host's schedule (logit-normal), "even"ly along it, or
            evenly in the noise itself ("unshifted"), as CLEAR's distill.py does; a host without flow matching takes
            "even" instead.
        optimizer: one of OPTIMIZERS.
        ema: decay of the average that is measured and saved instead of the last weights; 0 takes the last.
        clip: largest norm of the gradient.
        accumulation: draws per update.
        checkpointing: keep only the inputs of blocks, and compute them again in the backward pass.
        warmup: updates over which the learning rates rise, in each of the two.
        held_out: draws on which errors are measured.

    Raises:
        ValueError: a value is out of range, or nothing would be trained; the sentence names it.
    """

    method: ClassVar[str] = "finetune"
    block_updates: int = 200
    updates: int = 500
    trainables: str = "lora"
    rank: int = 64
    map_rate: float = 1e-3
    delta_rate: float = 1e-4
    flow: float = 0.0
    prediction: float = 1.0
    attention: float = 0.25
    attention_every: int = 4
    noise_levels: str = "middle"
    optimizer: str = "adamw"
    ema: float = 0.99
    clip: float = 1.0
    accumulation: int = 4
    checkpointing: bool = True
    warmup: int = 50
    held_out: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("block_updates", 0, MOST_UPDATES), ("updates", 0, MOST_UPDATES), ("rank", 1, MOST_RANK),
            ("attention_every", 1, MOST_DRAWS), ("accumulation", 1, MOST_DRAWS), ("warmup", 0, MOST_UPDATES),
            ("held_out", 1, MOST_DRAWS), ("seed", 0, MOST_SEED),
        ):  # fmt: skip
            check_whole(name, getattr(self, name), least, most)
        for name in ("map_rate", "delta_rate", "clip"):
            check_number(name, getattr(self, name), MOST_WEIGHT, above_zero=True)
        for name in ("flow", "prediction", "attention", "ema"):
            check_number(name, getattr(self, name), MOST_WEIGHT)
        check_boolean("checkpointing", self.checkpointing)
        check_choice("trainables", self.trainables, TRAINABLES)
        check_choice("noise_levels", self.noise_levels, NOISE_LEVELS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.ema >= 1:
            raise ValueError(f"ema is below 1, got {self.ema}; 0.99 averages over about a hundred updates")
        if self.optimizer in AVERAGING and self.ema:
            raise ValueError(f"optimizer {self.optimizer} averages by itself; set ema to 0")
        if not self.block_updates + self.updates:
            raise ValueError("block_updates and updates are both 0, so nothing would be trained")
        if self.updates and not self.flow + self.prediction + self.attention:
            raise ValueError("flow, prediction and attention are all 0, so end to end nothing would be learned")

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it."""
        return {"stage": self.method, **asdict(self)}


# losses and noise levels of a run end to end; ours follows the teacher with an anchor on a quarter of the sites
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {"flow": 0.0, "prediction": 1.0, "attention": 0.25, "attention_every": 4, "noise_levels": "middle"},
    # CLEAR (arXiv 2412.16112), its distill.py, on all kinds of sites instead of single blocks only
    "clear": {"flow": 1.0, "prediction": 0.5, "attention": 0.5, "attention_every": 4, "noise_levels": "unshifted"},
    # Attention Surgery (arXiv 2509.24899), its last stage; it does not tell how noise levels were drawn
    "attention_surgery": {"flow": 1.0, "prediction": 0.0, "attention": 0.0, "noise_levels": "middle"},
}
