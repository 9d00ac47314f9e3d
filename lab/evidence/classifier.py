"""A small classifier of drawn scenes; Frechet distances are taken on its features.

It learns what a teacher's captions name from small pictures, in seconds and always the same way.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE, FEATURES = 64, 16
STEPS, BATCH, RATE = 300, 32, 2e-3
LEAST, TESTS, TEST_SEED = 0.95, 256, 60_000  # right answers to every question, of drawn scenes that it did not see


class Classifier(nn.Module):
    """Three convolutions, a layer of FEATURES numbers, one answer per question.

    Args:
        channels: of the pictures.
        answers: how many there are to each question.
    """

    def __init__(self, channels: int, answers: list[int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(),
            nn.Linear(32 * (SIDE // 8) ** 2, FEATURES),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(FEATURES, count) for count in answers)

    def features(self, pictures: Tensor) -> Tensor:
        """Return (B, FEATURES) of pictures (B, channels, H, W) from 0 to 1."""
        return self.body(F.adaptive_avg_pool2d(pictures, SIDE) - 0.5)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Return logits (B, answers) per question."""
        features = F.gelu(self.features(pictures))
        return [head(features) for head in self.heads]


def trained(teacher: Any, folder: Path) -> Classifier:
    """Return the classifier of a teacher's scenes, from its file in a folder or trained now.

    Raises:
        RuntimeError: it answers too little of a question rightly.
    """
    file = folder / f"classifier_{teacher.name}.safetensors"
    choices = teacher.draw(999, 0).choices
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        model = Classifier(teacher.channels, [int(choices[name].max()) + 1 for name in teacher.asked])
        if file.exists():
            model.load_state_dict(load_file(file))
        else:
            train(model, teacher)
            if accuracy(model, teacher) < LEAST:
                raise RuntimeError(f"the classifier of {teacher.name} is right in less than {LEAST:.0%} of the scenes")
            save_file(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, teacher: Any) -> float:
    """Return the share of right answers to the question that it answers worst."""
    scenes = teacher.draw(TESTS, TEST_SEED)
    logits = model(teacher.drawn_views(scenes))
    right = [each.argmax(-1) == scenes.choices[name] for each, name in zip(logits, teacher.asked, strict=True)]
    return min(float(each.float().mean()) for each in right)


def train(model: Classifier, teacher: Any) -> None:
    """Fit a classifier to drawn scenes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        scenes = teacher.draw(BATCH, 50_000 + step)
        logits = model(teacher.drawn_views(scenes))
        loss = sum(
            (F.cross_entropy(each, scenes.choices[name]) for each, name in zip(logits, teacher.asked, strict=True)),
            start=torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
