"""A server that is killed in every stage of distillation: the next one goes on, and the student is the same bit by bit.

Each server's samples and jobs lie in an output folder that no other test uses.
"""

import contextlib
import json
import os
import signal

import pytest
import torch
from listening import events

from linearize.lab.demo.distill_chain import LAKE, needed_for
from linearize.training.engine.job_folder import read_values

SAMPLES, TRANSFER, FINETUNE, END = "4", "8", "10", "21"
NUM_SAMPLES, STEPS, UPDATES, BLOCK_UPDATES = 6, 3, 40, 16  # ComfyUI tells progress at most ten times a second
if not hasattr(signal, "SIGKILL"):
    pytest.skip("this system has no SIGKILL", allow_module_level=True)


def quick():
    """Return the demo's chain for hybrid attention, with few samples and updates, up to the fine-tuned student."""
    workflow = LAKE.of_kind("hybrid")
    workflow[END] = {"class_type": "LinearizeSiteErrors", "inputs": {"student": [FINETUNE, 0]}}
    workflow = needed_for(workflow, END)
    samples, transfer, tune = (workflow[node]["inputs"] for node in (SAMPLES, TRANSFER, FINETUNE))
    samples.update(name="kills", steps=STEPS, prompts="\n".join(samples["prompts"].splitlines()[:NUM_SAMPLES]))
    transfer.update(updates=UPDATES, output_draws=4, held_out=1)
    tune.update(updates=UPDATES - BLOCK_UPDATES, block_updates=BLOCK_UPDATES, held_out=1, accumulation=1, ema=0.9)
    return workflow


class Studio:
    """Servers, one after the other, that share an output folder."""

    def __init__(self, live, output):
        self._live, self.output = live, output
        output.mkdir()

    @contextlib.contextmanager
    def server(self):
        options = ["--output-directory", str(self.output)]
        with self._live.live_server(environment={"LINEARIZE_STRICT": "1"}, options=options) as running:
            yield running

    def run(self, node="", is_time=lambda value: False):
        """Queue the workflow on a new server; kill it where a node tells progress and `is_time` says so of its value.

        Returns:
            The first progress of each node, as (value, of how many), and the type of the last message.
        """
        first, last = {}, ""
        with self.server() as server:
            for last, data in events(server, quick()):
                assert last != "execution_error", data
                if last != "progress":
                    continue
                first.setdefault(data["node"], (data["value"], data["max"]))
                if data["node"] == node and is_time(data["value"]):
                    os.kill(server.process.pid, signal.SIGKILL)
                    server.process.wait()
                    break
        return first, last

    def num_samples(self):
        return len((self.output / "linearize" / "kills" / "index.jsonl").read_text(encoding="utf-8").splitlines())

    def job(self, kind):
        """Return the only job folder of a kind."""
        files = (self.output / "linearize" / "jobs").glob("*/job.json")
        (found,) = (each.parent for each in files if json.loads(each.read_text(encoding="utf-8"))["kind"] == kind)
        return found

    def updates(self, kind):
        """Return how many updates the saved state of a job has, 0 where there is none."""
        state = self.job(kind) / "state.safetensors"
        return read_values(state)[1]["done"] if state.exists() else 0

    def result(self, kind):
        return read_values(self.job(kind) / "result.safetensors")


def test_a_server_killed_in_every_stage_goes_on_bit_by_bit(live, tmp_path):
    killed = Studio(live, tmp_path / "killed")

    killed.run(SAMPLES, lambda value: value >= 2 * STEPS + 2)
    there = killed.num_samples()
    assert 0 < there < NUM_SAMPLES

    first, _ = killed.run(TRANSFER, lambda _: killed.updates("transfer") >= 3)
    assert first[SAMPLES][1] == STEPS * (NUM_SAMPLES - there), "only the samples that were missing are made"
    assert killed.num_samples() == NUM_SAMPLES and first[TRANSFER] == (1, UPDATES)
    transferred = killed.updates("transfer")
    assert 0 < transferred < UPDATES

    first, _ = killed.run(FINETUNE, lambda _: killed.updates("finetune") >= 3)
    assert SAMPLES not in first and first[TRANSFER] == (transferred + 1, UPDATES)
    assert first[FINETUNE] == (1, UPDATES)
    by_blocks = killed.updates("finetune")
    assert 0 < by_blocks < BLOCK_UPDATES, "killed in the first stage of fine-tuning"

    first, _ = killed.run(FINETUNE, lambda _: killed.updates("finetune") >= BLOCK_UPDATES + 3)
    assert first[FINETUNE] == (by_blocks + 1, UPDATES) and not {SAMPLES, TRANSFER} & first.keys()
    tuned = killed.updates("finetune")
    assert BLOCK_UPDATES < tuned < UPDATES, "killed in the second"

    first, last = killed.run()
    assert last == "execution_success"
    assert first[FINETUNE] == (tuned + 1, UPDATES) and not {SAMPLES, TRANSFER} & first.keys()

    whole = Studio(live, tmp_path / "whole")
    assert whole.run()[1] == "execution_success"
    for kind in ("transfer", "finetune"):
        (tensors, values), (others, other_values) = killed.result(kind), whole.result(kind)
        assert values == other_values and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), kind
    assert any(name.startswith("delta") for name in tensors), "the student was fine-tuned, not handed back"
