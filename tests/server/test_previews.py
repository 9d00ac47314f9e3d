"""Pictures on Fine-tune Student while it trains, as the page gets them."""

import io

import numpy as np
from listening import events
from PIL import Image

from linearize.lab.demo.distill_chain import LAKE, needed_for

SAMPLES, TRANSFER, FINETUNE, END = "4", "8", "10", "21"


def test_pictures_of_the_student_arrive_while_it_trains(live, tmp_path):
    workflow = LAKE.of_kind("hybrid")
    workflow[END] = {"class_type": "LinearizeSiteErrors", "inputs": {"student": [FINETUNE, 0]}}
    workflow = needed_for(workflow, END)
    samples = workflow[SAMPLES]["inputs"]
    samples.update(prompts="\n".join(samples["prompts"].splitlines()[:4]))
    workflow[TRANSFER]["inputs"].update(updates=20, output_draws=0, held_out=1)
    workflow[FINETUNE]["inputs"].update(updates=5, preview_every=2, held_out=1, accumulation=1)
    pictures = {node: [] for node in workflow}
    with live.live_server(options=["--output-directory", str(tmp_path)]) as server:
        for kind, data in events(server, workflow):
            if kind == "preview":
                pictures[data["node_id"]].append(Image.open(io.BytesIO(data["image"])).convert("RGB"))
    assert kind == "execution_success", data
    assert len(pictures[FINETUNE]) == 2, "after updates 2 and 4"
    teacher = np.asarray(pictures[SAMPLES][-1], dtype=float)  # of the last step of the sample that is held out
    for number, picture in enumerate(pictures[FINETUNE]):
        picture.save(tmp_path / f"preview_{number}.png")
        assert picture.size == pictures[SAMPLES][-1].size, "as large as the core's own previews"
        student = np.asarray(picture, dtype=float)
        assert np.corrcoef(student.ravel(), teacher.ravel())[0, 1] > 0.9, "the landscape, noised and seen clean again"
