"""The demo: dense, foveated and windowed pictures from a real ComfyUI server, and a table of what each cost.

`python run.py demo` calls it inside `.venv`. It queues the shipped workflows `api/foveated_demo.json` and
`api/clear_demo.json` for each caption with the same seed, the first also without its attention node; lets Compare with
Teacher measure the differences; times sampling; and lets Calibrate Attention say what is fastest here.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw, ImageFont

from .. import ROOT
from ..models.lake.scores import reflection
from ..server import LiveServer, ServerProblem, live_server
from .distill_chain import LAKE
from .readings import measures_of, picture_of, receipt_of, told

WORKFLOWS = ROOT / "lab" / "demo" / "api"
OUTPUT = ROOT / "lab" / "demo" / "output"


@dataclass(frozen=True)
class Variant:
    """A kind of attention that the demo shows.

    Args:
        kind: as receipts name it.
        node: class of the attention node of `{kind}_demo.json`.
        setting: its input that decides how much is seen.
    """

    kind: str
    node: str = ""
    setting: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether no attention node is used."""
        return not self.node

    @property
    def title(self) -> str:
        """The kind, and its setting as shipped."""
        if self.is_dense:
            return self.kind
        (inputs,) = (each["inputs"] for each in shipped(self.kind).values() if each["class_type"] == self.node)
        return f"{self.kind}, {self.setting} {inputs[self.setting]}"


DENSE = Variant("dense")
FOVEATED = Variant("foveated", "LinearizeFoveated", "keep")
CLEAR = Variant("clear", "LinearizeCLEAR", "radius")  # of about as many keys at SIZE
VARIANTS = (DENSE, FOVEATED, CLEAR)
CAPTIONS = (
    "dusk sun left mountains red house right pine left",
    "day sun right mountains blue house left oak right",
    "night moon middle hills yellow house right pine left",
)
SIZE, STEPS, TIMED_STEPS, TURNS = 512, 16, 6, 2  # pixels; the model is trained for 512
SECONDS = 1800  # the longest that one queued run may take
TEXT_TOKENS = 12  # of the demo's captions
CELL, LINE = 320, 24  # pixels per picture of a sheet; per line of text
FRONT_ROWS = 2  # captions on the sheet of the front page


@dataclass(frozen=True)
class Row:
    """What one variant cost and how far its pictures are from the dense ones.

    Args:
        variant: its title.
        seconds: seconds per step of a run without decoding, by pixels a side; the fastest of the turns.
        pairs: share of the query-key pairs of dense attention that were computed, by pixels a side, 0 to 1.
        share_linearized: share of attention calls that ran on the variant's kind, 0 to 1.
        psnr, ssim: mean over the captions, against dense; None for dense itself. PSNR in dB.
        reflection: mean correlation of the lake with the land mirrored in it, -1 to 1.
        memory_mib: the most memory that a server of its own held, while painting and for a step at the timed size.
    """

    variant: str
    seconds: dict[str, float]
    pairs: dict[str, float]
    share_linearized: float
    psnr: float | None
    ssim: float | None
    reflection: float
    memory_mib: float


def shipped(kind: str) -> dict[str, Any]:
    """Return the shipped workflow of a kind."""
    return json.loads((WORKFLOWS / f"{kind}_demo.json").read_text(encoding="utf-8"))


def workflow_for(variant: Variant, caption: str, size: int = SIZE, steps: int = STEPS, seed: int = 1) -> dict[str, Any]:
    """Return the shipped workflow of a variant at a size in pixels; dense is another's without its attention node."""
    source = FOVEATED if variant.is_dense else variant
    workflow = shipped(source.kind)
    ids = {node["class_type"]: key for key, node in workflow.items()}
    workflow[ids["LinearizeDemoCaption"]]["inputs"]["caption"] = caption
    workflow[ids["EmptySD3LatentImage"]]["inputs"].update(width=size, height=size)
    workflow[ids["LinearizeReport"]]["inputs"].update(width=size, height=size)
    workflow[ids["KSampler"]]["inputs"].update(steps=steps, seed=seed)
    if variant.is_dense:
        model = workflow.pop(ids[source.node])["inputs"]["model"]
        for node in workflow.values():
            if node["inputs"].get("model") == [ids[source.node], 0]:
                node["inputs"]["model"] = model
    return workflow


def sampling_only(workflow: dict[str, Any]) -> dict[str, Any]:
    """Return the workflow without decoding and saving, so that its time is that of the sampling."""
    return {key: node for key, node in workflow.items() if node["class_type"] not in ("VAEDecode", "SaveImage")}


def calibrate(server: LiveServer, size: int) -> str:
    """Return what Calibrate Attention says of the demo's model at a size in pixels, measured anew; save its map."""
    workflow = json.loads((WORKFLOWS / "calibrate_demo.json").read_text(encoding="utf-8"))
    ids = {node["class_type"]: key for key, node in workflow.items()}
    workflow[ids["LinearizeCalibrate"]]["inputs"]["again"] = True
    workflow[ids["EmptySD3LatentImage"]]["inputs"].update(width=size, height=size)
    kept = ("KSampler", "VAELoader", "VAEDecode", "SaveImage", "LinearizeReport")
    workflow = {key: node for key, node in workflow.items() if node["class_type"] not in kept}
    outputs, _ = server.measure(workflow, SECONDS)
    picture_of(server, outputs["PreviewImage"]["images"][0]).save(OUTPUT / "calibration.png")
    return outputs["PreviewAny"]["text"][0]


def comparison(first: dict[str, str], second: dict[str, str]) -> dict[str, Any]:
    """Return a workflow that compares two saved pictures; the second is the teacher's."""
    loads = {
        str(number): {
            "class_type": "LoadImage",
            "inputs": {"image": f"{saved['subfolder']}/{saved['filename']} [output]"},
        }
        for number, saved in enumerate((first, second), 1)
    }
    return {**loads, "3": {"class_type": "LinearizeCompare", "inputs": {"image": ["1", 0], "teacher": ["2", 0]}}}


class PeakMemory:
    """Watches how many bytes a process holds until it is stopped."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.peak, self._process, self._done = 0, psutil.Process(process.pid), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            try:
                self.peak = max(self.peak, self._process.memory_info().rss)
            except psutil.Error:
                return

    def stop(self) -> float:
        """Return the peak in MiB."""
        self._done.set()
        return self.peak / 2**20


def paint(variant: Variant, timed_size: int) -> tuple[list[dict[str, str]], float, float]:
    """Run a variant for every caption on a server of its own.

    Returns:
        Where the server saved the pictures, the share of attention calls that ran on the variant's kind, and its peak
        memory in MiB.
    """
    share, saved = 0.0, []
    with live_server() as server:
        memory = PeakMemory(server.process)
        for caption in CAPTIONS:
            outputs, _ = server.measure(workflow_for(variant, caption), SECONDS)
            saved.append(outputs["SaveImage"]["images"][0])
            if not variant.is_dense:
                share = receipt_of(picture_of(server, saved[-1]), variant.kind, LAKE.sites)["share_linearized"]
        server.run(sampling_only(workflow_for(variant, CAPTIONS[0], timed_size, 1)), SECONDS)
        return saved, share, memory.stop()


def time_steps(server: LiveServer, size: int) -> dict[str, tuple[float, float]]:
    """Return each kind's seconds per step at a size and the share of pairs it kept; the fastest of the turns."""
    found: dict[str, tuple[float, float]] = {}
    for turn in range(TURNS):
        for variant in VARIANTS:  # a new seed, or the server's cache answers
            workflow = workflow_for(variant, CAPTIONS[0], size, TIMED_STEPS, seed=100 * size + turn)
            _, seconds = server.measure(sampling_only(workflow), SECONDS)
            kept = 1.0
            if not variant.is_dense:  # the picture of the sampling that was timed, which the server's cache has
                outputs, _ = server.measure(workflow, SECONDS)
                picture = picture_of(server, outputs["SaveImage"]["images"][0])
                kept = receipt_of(picture, variant.kind, LAKE.sites)["share_of_pairs"]
            found[variant.kind] = min(found.get(variant.kind, (float("inf"), kept)), (seconds / TIMED_STEPS, kept))
    return found


def measure(
    server: LiveServer, saved: dict[str, list[dict[str, str]]], kind: str
) -> tuple[float, float, list[Image.Image]]:
    """Return mean PSNR and SSIM against dense, as Compare with Teacher gives them, and its difference pictures."""
    psnr, ssim, maps = [], [], []
    for picture, teacher in zip(saved[kind], saved[DENSE.kind], strict=True):
        outputs, _ = server.measure(comparison(picture, teacher), SECONDS)
        for values, value in zip((psnr, ssim), measures_of(outputs), strict=True):
            values.append(value)
        sheet = picture_of(server, outputs["LinearizeCompare"]["images"][0]).convert("RGB")
        maps.append(sheet.crop((sheet.width - SIZE, sheet.height - SIZE, sheet.width, sheet.height)))
    return sum(psnr) / len(psnr), sum(ssim) / len(ssim), maps


def save_pictures(columns: dict[str, list[Image.Image]]) -> None:
    """Save the pictures by title, a sheet of all, and for the front page one of the variants and the first captions."""
    for title, pictures in columns.items():
        for number, picture in enumerate(pictures, 1):
            picture.save(OUTPUT / f"{re.sub('[^a-z0-9.]+', '_', title)}_{number}.png")
    sheet(columns).save(OUTPUT / "sheet.png")
    variants = {each.title: columns[each.title][:FRONT_ROWS] for each in VARIANTS}
    sheet(variants).save(OUTPUT / "front.png")


def sheet(columns: dict[str, list[Image.Image]]) -> Image.Image:
    """Return a sheet with a titled column per key and a row per caption."""
    num_rows = len(next(iter(columns.values())))
    drawn = Image.new("RGB", (CELL * len(columns), (CELL + LINE) * num_rows + LINE), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(16)
    for column, (title, pictures) in enumerate(columns.items()):
        draw.text((column * CELL + 6, 2), title, fill="black", font=font)
        for line, picture in enumerate(pictures):
            small = picture.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS)
            drawn.paste(small, (column * CELL + 2, line * (CELL + LINE) + LINE + 2))
            if column == 0:
                draw.text((6, (line + 1) * (CELL + LINE)), CAPTIONS[line], fill="black", font=font)
    return drawn


def print_table(rows: list[Row], sizes: tuple[int, ...], calibration: str, seconds: float) -> None:
    """Print rows and calibration for a person and write them to table.json."""
    heads = "".join(f" {f's/step {size}':>12}" for size in sizes) + "".join(f" {f'pairs {size}':>11}" for size in sizes)
    print(f"\n{'attention':20}{heads} {'PSNR':>9} {'SSIM':>6} {'mirror':>7} {'linearized':>11} {'memory':>10}")
    for row in rows:
        times = "".join(f" {row.seconds[str(size)]:12.3f}" for size in sizes)
        pairs = "".join(f" {row.pairs[str(size)]:11.1%}" for size in sizes)
        psnr = "-" if row.psnr is None else f"{row.psnr:.1f} dB"
        ssim = "-" if row.ssim is None else f"{row.ssim:.3f}"
        print(
            f"{row.variant:20}{times}{pairs} {psnr:>9} {ssim:>6} {row.reflection:7.2f} {row.share_linearized:11.0%}"
            f" {row.memory_mib:6.0f} MiB"
        )
    print(
        f"Pictures: {SIZE} x {SIZE} pixels, {STEPS} steps, {len(CAPTIONS)} captions, nothing trained. PSNR and SSIM"
        " are against dense.\nMirror is how well the lake repeats the land, 1 at best. Seconds count no decoding."
    )
    print(f"\nCalibrate Attention, {sizes[-1]} x {sizes[-1]} pixels:\n{calibration}")
    table = {
        "size": SIZE,
        "steps": STEPS,
        "sizes": list(sizes),
        "text": TEXT_TOKENS,
        **told(seconds),
        "rows": list(map(asdict, rows)),
        "calibration": calibration,
    }
    (OUTPUT / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def run_demo(timed_size: int) -> None:
    """Paint, compare and time every variant, then write pictures and table."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start, sizes = time.monotonic(), tuple(dict.fromkeys((SIZE, timed_size)))
    saved, share, memory, times = {}, {}, {}, {}
    for variant in VARIANTS:
        print(f"starting ComfyUI; painting {len(CAPTIONS)} pictures: {variant.title} ...", flush=True)
        saved[variant.kind], share[variant.kind], memory[variant.kind] = paint(variant, timed_size)
    with live_server() as server:
        server.run(workflow_for(CLEAR, CAPTIONS[0], SIZE, 1), SECONDS)  # loads the models
        for size in sizes:
            print(f"timing {TIMED_STEPS} steps at {size} x {size} pixels ...", flush=True)
            times[str(size)] = time_steps(server, size)
        print("calibrating ...", flush=True)
        calibration = calibrate(server, sizes[-1])
        rows, columns, maps = [], {}, {}
        for variant in VARIANTS:
            kind, title = variant.kind, variant.title
            columns[title] = [picture_of(server, each).convert("RGB") for each in saved[kind]]
            pixels = torch.from_numpy(np.stack([np.asarray(each) for each in columns[title]])).permute(0, 3, 1, 2)
            mirror = reflection(pixels / 255).mean().item()
            psnr = ssim = None
            if not variant.is_dense:
                psnr, ssim, maps[f"{kind}: difference x 8"] = measure(server, saved, kind)
            seconds, pairs = ({size: found[kind][part] for size, found in times.items()} for part in (0, 1))
            rows.append(Row(title, seconds, pairs, share[kind], psnr, ssim, mirror, memory[kind]))
    save_pictures({**columns, **maps})
    print_table(rows, sizes, calibration, time.monotonic() - start)
    print(f"\nThe pictures are in {OUTPUT.relative_to(ROOT)}: open sheet.png there to see them side by side.")
    print("python run.py serve opens such a graph in the browser, to turn keep and radius yourself.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Dense and linearized pictures from a real ComfyUI server.")
    parser.add_argument("--size", type=int, default=1024, help="a second size to time, in pixels a side (default 1024)")
    size = parser.parse_args().size
    if size % 16 or not 256 <= size <= 4096:
        print(f"--size must be a multiple of 16 from 256 to 4096, got {size}.", file=sys.stderr)
        return 1
    try:
        run_demo(size)
        return 0
    except ServerProblem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
