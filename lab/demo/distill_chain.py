"""The shipped distillation workflows as the demo runs them: whole, for one kind, untrained, from a file."""

import json
from dataclasses import dataclass
from typing import Any

from .. import ROOT

PLANS = {"linear": "5", "hybrid": "6", "clear": "7"}  # kinds, and the nodes with their plans; ids are alike in all
Workflow = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """A workflow from prompts to a student, and of which of the demo's models.

    Args:
        model: name of the model, and of the folder that students are saved in.
        title: for people.
        workflow: name of the file in `lab/demo/api`.
        sites: ids of the model's self-attentions.
        pictures: how many are compared, of one caption, each from noise of its own; of a clip every frame counts.
        size: width and height of a picture.
        shown: number of the picture on the sheet.
    """

    model: str
    title: str
    workflow: str
    sites: tuple[str, ...]
    pictures: int
    size: tuple[int, int]
    shown: int = 0

    def shipped(self) -> Workflow:
        """Return the workflow as it is shipped."""
        return json.loads((ROOT / "lab" / "demo" / "api" / f"{self.workflow}.json").read_text(encoding="utf-8"))

    @property
    def budget(self) -> dict[str, Any]:
        """What the mixture is planned for: share of dense attention, size, frames."""
        inputs = self.shipped()["9"]["inputs"]
        return {name: inputs[name] for name in ("budget", "width", "height", "frames")}

    def of_kind(self, kind: str, updates: int | None = None) -> Workflow:
        """Return the workflow for one kind alone: no budget, every site; `updates` replaces those of the transfer."""
        workflow = self.shipped()
        transfer, tune = workflow["8"]["inputs"], workflow["10"]["inputs"]
        for name in [name for name in transfer if name.startswith("plans.")]:
            del transfer[name]
        transfer["plans.plan0"] = [PLANS[kind], 0]
        if updates is not None:
            transfer.update(updates=updates, output_draws=0)
        tune["student"] = ["8", 0]
        workflow["11"]["inputs"]["name"] = f"{self.model}/{kind}"
        return needed_for(self._with_pictures(workflow), "11", "19", "25")

    def untrained(self, kind: str) -> Workflow:
        """Return the workflow for one kind with the model's own weights; a few updates of fine-tuning measure it."""
        workflow = self.of_kind(kind, updates=0)
        workflow["10"]["inputs"].update(updates=8, block_updates=0)
        workflow["11"]["inputs"]["name"] = f"{self.model}/{kind}_untrained"
        workflow["12"]["inputs"]["attention"] = [PLANS[kind], 0]
        return workflow

    def reloaded(self, name: str) -> Workflow:
        """Return a workflow that samples with a student from its file and compares with the teacher."""
        workflow = self._with_pictures(self.shipped())
        workflow["12"] = {
            "class_type": "LinearizeLoadStudent",
            "inputs": {"model": ["1", 0], "student": name, "hub_file": "", "allow_download": False},
        }
        return needed_for(workflow, "19", "25")

    def _with_pictures(self, workflow: Workflow) -> Workflow:
        """Return the workflow with several pictures sampled and compared instead of one."""
        workflow["24"] = {"class_type": workflow["3"]["class_type"], "inputs": {**workflow["3"]["inputs"]}}
        workflow["24"]["inputs"]["batch_size"] = self.pictures
        for sampler in ("14", "15"):
            workflow[sampler]["inputs"]["latent_image"] = ["24", 0]
        workflow["25"] = {"class_type": "PreviewImage", "inputs": {"images": ["19", 1]}}
        return workflow


def needed_for(workflow: Workflow, *ends: str) -> Workflow:
    """Return the nodes that some nodes depend on, and these."""
    kept: Workflow = {}
    waiting = list(ends)
    while waiting:
        key = waiting.pop()
        if key not in kept:
            kept[key] = workflow[key]
            waiting += [value[0] for value in workflow[key]["inputs"].values() if isinstance(value, list)]
    return kept


LAKE_SITES = ("double.0", *(f"single.{number}" for number in range(4)))
CLIPS_SITES = tuple(f"blocks.{number}" for number in range(4))
LAKE = Chain("lake", "a small FLUX", "distill_demo", sites=LAKE_SITES, pictures=4, size=(256, 256))
CLIPS = Chain("clips", "a small Wan", "distill_clips", sites=CLIPS_SITES, pictures=2, size=(256, 192), shown=3)
CHAINS = {"flux": LAKE, "wan": CLIPS}
