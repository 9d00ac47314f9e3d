"""What fine-tuning takes of a device's memory, before it starts: an estimate from sizes, good to a factor of two.

Kernels' scratch memory and fragments are not in it.
"""

from dataclasses import dataclass

from ...attention.words import memory_size

WEIGHT_BYTES = 4  # trained parameters, their gradients and averages are fp32
# bytes that an optimiser keeps per parameter
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "prodigy": 16, "schedule_free": 8}
KEPT = 20  # numbers of one token that a block keeps for its backward pass, in widths of the model; 17 in a tiny FLUX
KEPT_IN_FP32 = 4  # of which some kinds and norms keep a copy in fp32


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a fine-tuning run.

    Args:
        base: the model's own weights.
        trained: parameters that learn, with gradients, moments and average.
        activations: what is kept for the backward pass at its peak.
    """

    base: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.trained + self.activations

    def text(self, free: int | None = None) -> str:
        """Return one line.

        Args:
            free: bytes that the device has for it, where that is known.
        """
        line = (
            f"needs about {memory_size(self.total)}: model {memory_size(self.base)}, "
            f"trained weights {memory_size(self.trained)}, activations {memory_size(self.activations)}"
        )
        if free is None:
            return line
        enough = "" if self.total <= free else "; that may not suffice, lower rank or paint smaller samples"
        return f"{line}; {memory_size(free)} are free{enough}"


def estimate(
    base_bytes: int,
    num_trained: int,
    *,
    optimizer: str,
    has_average: bool,
    num_tokens: int,
    width: int,
    num_blocks: int,
    checkpointing: bool,
    value_bytes: int = 2,
    num_cast: int = 0,
) -> Estimate:
    """Return what a run end to end needs; block by block it needs less.

    Args:
        base_bytes: of the model's weights on the device.
        num_trained: parameters that learn.
        optimizer: its name.
        has_average: whether an average of the parameters is kept.
        num_tokens: of one forward, batch included.
        width: heads times head dimension.
        num_blocks: transformer blocks.
        checkpointing: whether only what goes into a block is kept, and one block is whole at a time.
        value_bytes: of a number in activations, 2 in bf16.
        num_cast: the model's weights that are stored in another dtype; a backward pass keeps them as they were cast.
    """
    copies = 2 + has_average
    trained = num_trained * (copies * WEIGHT_BYTES + MOMENT_BYTES[optimizer])
    block = num_tokens * width * (KEPT * value_bytes + KEPT_IN_FP32 * 4) + num_cast * value_bytes // max(1, num_blocks)
    inputs = num_tokens * width * value_bytes
    activations = num_blocks * inputs + block if checkpointing else num_blocks * block
    return Estimate(base_bytes, trained, activations)
