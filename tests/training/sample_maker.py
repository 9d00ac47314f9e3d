"""Makes samples without a model, for tests that stop it; as a program, until it is killed: a line per sample."""

import sys
from pathlib import Path

import torch

from linearize.attention.students.fingerprint import LENGTH
from linearize.training.samples.conditioning import Conditioning
from linearize.training.samples.index import About
from linearize.training.samples.writer import Request, SamplesWriter

PROMPTS = ["a lake", "a red house, “quoted”", "湖"]
FINGERPRINT = torch.linspace(0.5, 1.5, LENGTH)


def about(**changes):
    settings = {"host": "flux", "fingerprint": FINGERPRINT, "latent_shape": (1, 4, 6, 8), "sampler": "euler",
                "scheduler": "simple", "steps": 4, "cfg": 3.5, "guidance": 0.0, "seeds": 2, "first_seed": 7,
                "base_model": "tiny.safetensors"}  # fmt: skip
    return About(**{**settings, **changes})


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(text):
    seed = sum(text.encode())
    tensors = {"pooled_output": noise(seed, 1, 8).bfloat16(), "attention_mask": torch.tensor([[True, False]])}
    return Conditioning(noise(seed + 1, 1, 5, 8), tensors, {"guidance": 3.5, "method": "offset", "none": None})


def wanted(prompts=PROMPTS, seeds=2):
    return [Request(number, prompts[number // seeds]) for number in range(len(prompts) * seeds)]


def make(folder, settings=None, prompts=PROMPTS, tell=lambda _: None):
    """Make what is missing; return the numbers that were made."""
    settings = settings or about()
    made = []
    with SamplesWriter(folder, settings) as writer:
        negative = writer.put(condition("")) if settings.uses_negative else None
        for each in writer.missing(wanted(prompts, settings.seeds)):
            positive = writer.put(condition(each.prompt))
            latent = noise(settings.seed(each.number), *settings.latent_shape)
            writer.add(each.number, each.prompt, latent, positive, negative)
            made.append(each.number)
            tell(each.number)
    return made


def tell_parent(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    make(Path(sys.argv[1]), about(latent_shape=(1, 16, 200, 200)), tell=tell_parent)
