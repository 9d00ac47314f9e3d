"""The distillation demo: students of the demo's models, from samples to files, and the gain of each step.

`python run.py demo --distill` calls it inside `.venv`, `--distill wan` for the video model. It queues the workflow of
`distill_chain.py` on a real server, whole and once per kind of attention; loads what was saved; and compares pictures
of dense attention, of the kind with the model's own weights, and of the student.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw
from safetensors import safe_open

from .. import ROOT
from ..comfyui import BASE
from ..server import LiveServer, ServerProblem, live_server
from .distill_chain import CHAINS, PLANS, Chain, Workflow
from .readings import measures_of, picture_of, receipt_of, told

OUTPUT = ROOT / "lab" / "demo" / "output" / "distill"
STUDENTS = BASE / "models" / "linearize"
RATIO = {"linear": 8.0, "hybrid": 8.0, "clear": 3.0}  # by which the velocity error is to fall, at least
GAIN_DB = 6.0  # of PSNR to the teacher's pictures, at least, mean over them
SECONDS = 900  # the longest that one queued run may take


@dataclass(frozen=True)
class Row:
    """What distillation did to one kind.

    Args:
        error: relative energy of the velocity's error on held-out samples: with the model's own weights, after Distill
            Attention, after Fine-tune Student.
        psnr: to the teacher's pictures, in dB, mean over them, or over frames: with the model's own weights, of the
            student.
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
                f"{self.kind}: error fell {self.error[0] / self.error[2]:.1f} times, needed {RATIO[self.kind]}"
            )
        if self.psnr[1] < self.psnr[0] + GAIN_DB:
            found.append(f"{self.kind}: PSNR rose {self.psnr[1] - self.psnr[0]:.1f} dB, needed {GAIN_DB}")
        return found


def saved_file(workflow: Workflow) -> str:
    """Return the newest file that a workflow's Save Linearized Attention wrote, as Load Linearized Attention lists it.

    Raises:
        ServerProblem: there is none.
    """
    (name,) = (node["inputs"]["name"] for node in workflow.values() if node["class_type"] == "LinearizeSaveStudent")
    files = sorted(STUDENTS.glob(f"{name}_[0-9]*_.safetensors"))
    if not files:
        raise ServerProblem(f"no file of {name} was saved")
    return files[-1].relative_to(STUDENTS).as_posix()


def recipe_of(name: str) -> dict[str, Any]:
    """Return how a saved student was trained, as its file tells, by stage."""
    with safe_open(STUDENTS / name, "pt") as file:
        return json.loads(file.metadata()["recipe"])


def tuned(name: str) -> dict[str, Any]:
    """Return how Fine-tune Student changed a saved student.

    Raises:
        ServerProblem: it did not, its held-out error rose, and the student came out as it went in; or no error could
            be measured.
    """
    recipe = recipe_of(name)
    if "finetune" not in recipe:
        raise ServerProblem(
            f"Fine-tune Student gave {name} back as it came in, because its held-out error rose; lower map_rate and "
            "delta_rate in the workflow"
        )
    facts = recipe["finetune"]
    if None in (facts["error_before"], facts["error_after"]):
        raise ServerProblem(f"the error of {name} could not be measured, because values there are infinite or NaN")
    return facts


def distill(server: LiveServer, chain: Chain, kind: str) -> tuple[Row, list[Image.Image]]:
    """Distil one kind, save it, load it again; return what that gained, and the three pictures."""
    untrained, trained = chain.untrained(kind), chain.of_kind(kind)
    before, seconds = server.measure(untrained, SECONDS)
    start = tuned(saved_file(untrained))["error_before"]
    student, more = server.measure(trained, SECONDS)
    name = saved_file(trained)
    found = tuned(name)
    again, last = server.measure(chain.reloaded(name), SECONDS)
    shown = [picture_of(server, each["PreviewImage"]["images"][chain.shown]) for each in (before, again)]
    receipt_of(shown[1], kind, chain.sites)
    if measures_of(again) != measures_of(student):
        raise ServerProblem(f"the saved {kind} student paints another picture than the one in memory")
    error = start, found["error_before"], found["error_after"]
    row = Row(kind, error, (measures_of(before)[0], measures_of(again)[0]), seconds + more + last)
    return row, pictures(chain.size, *shown)


def pictures(size: tuple[int, int], before: Image.Image, after: Image.Image) -> list[Image.Image]:
    """Return teacher, untrained and student from the sheets of Compare with Teacher: teacher, picture, difference."""
    width, height = size
    top, right = before.height - height, width + (before.width - 3 * width) // 2
    places = ((before, 0), (before, right), (after, right))
    return [sheet.convert("RGB").crop((x, top, x + width, top + height)) for sheet, x in places]


def save_sheet(rows: dict[str, list[Image.Image]], path: Path) -> None:
    """Save one row of pictures per kind."""
    width, height = next(iter(rows.values()))[0].size
    sheet = Image.new("RGB", (3 * width, len(rows) * (height + 22)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (kind, row) in enumerate(rows.items()):
        for column, title in enumerate(("dense", f"{kind}, untrained", f"{kind}, student")):
            draw.text((column * width + 6, line * (height + 22) + 4), title, fill="black")
            sheet.paste(row[column], (column * width, line * (height + 22) + 22))
    sheet.save(path)


@contextlib.contextmanager
def fresh_server() -> Iterator[LiveServer]:
    """Start a server with an empty output folder, because a finished job of an earlier run would answer at once."""
    with TemporaryDirectory() as folder, live_server(options=("--output-directory", folder)) as server:
        yield server


def run_chain(chain: Chain) -> list[str]:
    """Distil every kind and the workflow as it is shipped, write table and sheet; return what is not good enough."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start, rows, sheets = time.monotonic(), [], {}
    with fresh_server() as server:
        for kind in PLANS:
            print(f"distilling {chain.title}: {kind} ...", flush=True)
            row, sheets[kind] = distill(server, chain, kind)
            rows.append(row)
    print("distilling a mixture under a budget ...", flush=True)
    with fresh_server() as server:
        outputs, seconds = server.measure(chain.shipped(), SECONDS)
    psnr, _ = measures_of(outputs)
    save_sheet(sheets, OUTPUT / f"{chain.model}.png")
    table = {**told(time.monotonic() - start), "title": chain.title, "sites": len(chain.sites),
             "pictures": chain.pictures, "rows": list(map(asdict, rows)),
             "mixture": {"psnr": psnr, "seconds": seconds, **chain.budget}}  # fmt: skip
    (OUTPUT / f"{chain.model}.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print_table(rows)
    mixture = f"The mixture that Budget Plan chose: PSNR {psnr:.1f} dB, {seconds:.0f} s for the whole chain."
    print(f"{mixture} All of it took {table['seconds']} s.\nErrors are of the predicted velocity, on held-out samples.")
    print(f"Pictures: {(OUTPUT / chain.model).relative_to(ROOT)}.png")
    return [failure for row in rows for failure in row.failures]


def print_table(rows: list[Row]) -> None:
    """Print what was measured."""
    print(f"\n{'kind':8}{'untrained':>12}{'stage 1':>10}{'tuned':>10}{'times':>8}{'PSNR':>18}{'seconds':>10}")
    for row in rows:
        errors = "".join(f"{error:10.2%}" for error in row.error)
        fall, psnr = row.error[0] / row.error[2], f"{row.psnr[0]:.1f} -> {row.psnr[1]:.1f} dB"
        print(f"{row.kind:10}{errors}{fall:8.1f}{psnr:>18}{row.seconds:10.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil students of one of the demo's models.")
    parser.add_argument("model", nargs="?", default="flux", choices=CHAINS, help="the picture or the video model")
    try:
        failures = run_chain(CHAINS[parser.parse_args().model])
    except ServerProblem as problem:
        failures = [str(problem)]
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
