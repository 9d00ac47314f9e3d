"""The distillation demo: a student of the demo's model, from its own samples to a file, and what each step gained.

`python run.py demo --distill` calls it inside `.venv`. It queues the shipped workflow `demo/api/distill_demo.json` on a
real server, whole and once per kind of attention; loads what was saved; and compares pictures of dense attention, of
the kind with the model's own weights, and of the student.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

from live_server import BASE, ROOT, LiveServer, ServerProblem, live_server
from origin import origin
from PIL import Image, ImageDraw

WORKFLOW = ROOT / "demo" / "api" / "distill_demo.json"
OUTPUT = ROOT / "demo" / "output" / "distill"
PLANS = {"linear": "5", "hybrid": "6", "clear": "7"}  # kinds, and the nodes with their plans
RATIO = {"linear": 8.0, "hybrid": 8.0, "clear": 3.0}  # by which the velocity error is to fall, at least
GAIN_DB = 6.0  # of PSNR to the teacher's pictures, at least, mean over them
PICTURES = 4  # of one caption, each from noise of its own
SECONDS = 900  # the longest that one queued run may take
CELL = 256
Workflow = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What distillation did to one kind.

    Args:
        error: relative energy of the velocity's error on held-out samples: with the model's own weights, after Distill
            Attention, after Fine-tune Student.
        psnr: of pictures to the teacher's, in dB, mean over `PICTURES`: with the model's own weights, of the student.
        seconds: of the server for all of it.
    """

    kind: str
    error: tuple[float, float, float]
    psnr: tuple[float, float]
    seconds: float

    @property
    def failures(self) -> list[str]:
        """What is not as good as it has to be."""
        found = []
        if self.error[2] * RATIO[self.kind] > self.error[0]:
            found.append(
                f"{self.kind}: error fell {self.error[0] / self.error[2]:.1f} times, wanted {RATIO[self.kind]}"
            )
        if self.psnr[1] < self.psnr[0] + GAIN_DB:
            found.append(f"{self.kind}: PSNR rose {self.psnr[1] - self.psnr[0]:.1f} dB, wanted {GAIN_DB}")
        return found


def shipped() -> Workflow:
    """Return the workflow as it is shipped."""
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


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


def of_kind(kind: str, updates: int | None = None) -> Workflow:
    """Return the workflow for one kind alone: no budget, every site; `updates` replaces those of Distill Attention."""
    workflow = shipped()
    transfer, tune = workflow["8"]["inputs"], workflow["10"]["inputs"]
    for name in [name for name in transfer if name.startswith("plans.")]:
        del transfer[name]
    transfer["plans.plan0"] = [PLANS[kind], 0]
    if kind == "clear":
        transfer["updates"] = 0  # windows have nothing to learn but the matrices, which take no update
    if updates is not None:
        transfer.update(updates=updates, output_draws=0)
    tune["student"] = ["8", 0]
    workflow["11"]["inputs"]["name"] = f"lake/{kind}"
    return needed_for(with_pictures(workflow), "11", "19", "20", "25")


def with_pictures(workflow: Workflow) -> Workflow:
    """Return the workflow with several pictures sampled and compared instead of one."""
    workflow["24"] = {"class_type": workflow["3"]["class_type"], "inputs": {**workflow["3"]["inputs"]}}
    workflow["24"]["inputs"]["batch_size"] = PICTURES
    for sampler in ("14", "15"):
        workflow[sampler]["inputs"]["latent_image"] = ["24", 0]
    workflow["25"] = {"class_type": "PreviewImage", "inputs": {"images": ["19", 1]}}
    return workflow


def untrained(kind: str) -> Workflow:
    """Return the workflow for one kind with the model's own weights; it is fine-tuned once, only to be measured."""
    workflow = of_kind(kind, updates=0)
    workflow["10"]["inputs"].update(updates=8, block_updates=0)
    workflow["11"]["inputs"]["name"] = f"lake/{kind}_untrained"
    workflow["12"]["inputs"]["attention"] = [PLANS[kind], 0]
    return workflow


def reloaded(name: str) -> Workflow:
    """Return a workflow that samples with a student from its file and compares with the teacher."""
    workflow = with_pictures(shipped())
    workflow["12"] = {
        "class_type": "LinearizeLoadStudent",
        "inputs": {"model": ["1", 0], "student": name, "hub_file": "", "allow_download": False},
    }
    return needed_for(workflow, "19", "20", "25")


def run(server: LiveServer, workflow: Workflow) -> tuple[dict[str, Any], float]:
    """Return the outputs of a workflow by node type, and its seconds."""
    prompt = server.queue(workflow)
    outputs = server.wait(prompt, SECONDS)
    return {workflow[key]["class_type"]: output for key, output in outputs.items()}, server.seconds(prompt)


def psnr_of(outputs: dict[str, Any]) -> float:
    """Return the PSNR that Compare with Teacher gave.

    Raises:
        ServerProblem: it gave none.
    """
    text = outputs["LinearizeCompare"]["text"][0]
    found = re.search(r"PSNR ([\d.]+) dB", text)
    if found is None:
        raise ServerProblem(f"Compare with Teacher gave no PSNR:\n{text}")
    return float(found[1])


def saved_file(outputs: dict[str, Any]) -> str:
    """Return the name of the file that Save Linearized Attention wrote, as Load Linearized Attention lists it."""
    text = outputs["LinearizeSaveStudent"]["text"][0]
    found = re.search(r"lake/\w+_\d{5}_\.safetensors", text)
    if found is None:
        raise ServerProblem(f"no file was saved:\n{text}")
    return found[0]


def recipe_of(name: str) -> dict[str, Any]:
    """Return how a saved student was trained, as its file tells, by stage."""
    with (BASE / "models" / "linearize" / name).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["recipe"])


def tuned(name: str) -> dict[str, Any]:
    """Return how Fine-tune Student changed a saved student.

    Raises:
        ServerProblem: it did not: its held-out error rose, and the student came out as it went in.
    """
    recipe = recipe_of(name)
    if "finetune" not in recipe:
        raise ServerProblem(
            f"Fine-tune Student gave {name} back as it came in, because its held-out error rose; lower map_rate and "
            f"delta_rate in {WORKFLOW.relative_to(ROOT)}"
        )
    return recipe["finetune"]


def what_ran(outputs: dict[str, Any], kind: str) -> None:
    """Raise ServerProblem unless every site of the student's run was linearized."""
    report = outputs["LinearizeReport"]["text"][0]
    ran = report.partition("in the last sampling:")[2]
    if not re.search(rf"^{kind} \(\w+\): 5 sites$", ran, flags=re.MULTILINE) or "100% linearized" not in ran:
        raise ServerProblem(f"not every site ran on {kind}; its Attention Report says:\n{ran or report}")


def distill(server: LiveServer, kind: str) -> tuple[Row, list[Image.Image]]:
    """Distil one kind, save it, load it again; return what that gained, and the three pictures."""
    before, seconds = run(server, untrained(kind))
    start = tuned(saved_file(before))["error_before"]
    student, more = run(server, of_kind(kind))
    name = saved_file(student)
    found = tuned(name)
    again, last = run(server, reloaded(name))
    what_ran(again, kind)
    if psnr_of(again) != psnr_of(student):
        raise ServerProblem(f"the saved {kind} student paints another picture than the one in memory")
    error = start, found["error_before"], found["error_after"]
    row = Row(kind, error, (psnr_of(before), psnr_of(again)), seconds + more + last)
    sheets = [Image.open(BytesIO(server.image(each["PreviewImage"]["images"][0]))) for each in (before, again)]
    return row, pictures(*sheets)


def pictures(before: Image.Image, after: Image.Image) -> list[Image.Image]:
    """Return teacher, untrained and student from the sheets of Compare with Teacher: teacher, picture, difference."""
    top, right = before.height - CELL, CELL + (before.width - 3 * CELL) // 2
    places = ((before, 0), (before, right), (after, right))
    return [sheet.convert("RGB").crop((x, top, x + CELL, top + CELL)) for sheet, x in places]


def save_sheet(rows: dict[str, list[Image.Image]]) -> None:
    """Save one row of pictures per kind."""
    sheet = Image.new("RGB", (3 * CELL, len(rows) * (CELL + 22)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (kind, row) in enumerate(rows.items()):
        for column, title in enumerate(("dense", f"{kind}, untrained", f"{kind}, student")):
            draw.text((column * CELL + 6, line * (CELL + 22) + 4), title, fill="black")
            sheet.paste(row[column], (column * CELL, line * (CELL + 22) + 22))
    sheet.save(OUTPUT / "sheet.png")


def main() -> int:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start, rows, sheets = time.monotonic(), [], {}
    try:
        with live_server() as server:
            for kind in PLANS:
                print(f"distilling {kind} ...", flush=True)
                row, sheets[kind] = distill(server, kind)
                rows.append(row)
            print("distilling a mixture under a budget ...", flush=True)
            outputs, _ = run(server, shipped())
            mixture = psnr_of(outputs)
    except ServerProblem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    save_sheet(sheets)
    table = {**origin(time.monotonic() - start), "mixture_psnr": mixture, "rows": list(map(asdict, rows))}
    (OUTPUT / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'kind':8}{'untrained':>12}{'stage 1':>10}{'tuned':>10}{'times':>8}{'PSNR':>18}{'seconds':>10}")
    for row in rows:
        errors = "".join(f"{error:10.2%}" for error in row.error)
        fall, psnr = row.error[0] / row.error[2], f"{row.psnr[0]:.1f} -> {row.psnr[1]:.1f} dB"
        print(f"{row.kind:10}{errors}{fall:8.1f}{psnr:>18}{row.seconds:10.0f}")
    print(f"The mixture that Budget Plan chose: PSNR {mixture:.1f} dB. All of it took {table['seconds']} s.")
    print(f"Errors are of the predicted velocity, on held-out samples. Pictures: {OUTPUT.relative_to(ROOT)}/sheet.png")
    failures = [failure for row in rows for failure in row.failures]
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
