"""The demo: dense and windowed pictures from a real ComfyUI server, and a table of what each cost.

`python run.py demo` calls it inside `.venv`. It queues the shipped workflow `api/clear_demo.json` for each caption and
each kind of attention with the same seed, lets Compare with Teacher measure the differences, and times sampling.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw

from .. import ROOT
from ..models.lake.scores import reflection
from ..server import LiveServer, ServerProblem, live_server
from .distill_chain import LAKE
from .readings import measures_of, picture_of, receipt_of, told

WORKFLOW = ROOT / "lab" / "demo" / "api" / "clear_demo.json"
OUTPUT = ROOT / "lab" / "demo" / "output"
VARIANTS = {"dense": None, "clear_8": 8, "clear_4": 4}  # radius in tokens
CAPTIONS = (
    "dusk sun left mountains red house right pine left",
    "day sun right mountains blue house left oak right",
    "night moon middle hills yellow house right pine left",
)
SIZE, STEPS, TIMED_STEPS, TURNS = 512, 16, 6, 2  # pixels; the model is trained for 512
SECONDS = 1800  # the longest that one queued run may take
TEXT_TOKENS = 12  # of the demo's captions
CELL = 320  # pixels per picture of the sheet


@dataclass(frozen=True)
class Row:
    """What one variant cost and how far its pictures are from the dense ones.

    Args:
        seconds: seconds per step of a run without decoding, by pixels a side; the fastest of the turns.
        pairs: share of the query-key pairs of dense attention that were computed, by pixels a side, 0 to 1.
        share_linearized: share of attention calls that ran on CLEAR, 0 to 1.
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


def workflow_for(
    radius: int | None, caption: str, size: int = SIZE, steps: int = STEPS, seed: int = 1
) -> dict[str, Any]:
    """Return the shipped workflow with these settings; a radius of None takes the CLEAR node out."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    ids = {node["class_type"]: key for key, node in workflow.items()}
    workflow[ids["LinearizeDemoCaption"]]["inputs"]["caption"] = caption
    workflow[ids["EmptySD3LatentImage"]]["inputs"].update(width=size, height=size)
    workflow[ids["LinearizeReport"]]["inputs"].update(width=size, height=size)
    workflow[ids["KSampler"]]["inputs"].update(steps=steps, seed=seed)
    clear = workflow[ids["LinearizeCLEAR"]]["inputs"]
    if radius is not None:
        clear["radius"] = radius
        return workflow
    del workflow[ids["LinearizeCLEAR"]]
    for node in workflow.values():
        if node["inputs"].get("model") == [ids["LinearizeCLEAR"], 0]:
            node["inputs"]["model"] = clear["model"]
    return workflow


def sampling_only(workflow: dict[str, Any]) -> dict[str, Any]:
    """Return the workflow without decoding and saving, so that its time is that of the sampling."""
    return {key: node for key, node in workflow.items() if node["class_type"] not in ("VAEDecode", "SaveImage")}


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


def paint(variant: str, timed_size: int) -> tuple[list[dict[str, str]], float, float]:
    """Run a variant for every caption on a server of its own.

    Returns:
        Where the server saved the pictures, the share of attention calls that ran on CLEAR, and its peak memory in MiB.
    """
    share, saved = 0.0, []
    with live_server() as server:
        memory = PeakMemory(server.process)
        for caption in CAPTIONS:
            outputs, _ = server.measure(workflow_for(VARIANTS[variant], caption), SECONDS)
            saved.append(outputs["SaveImage"]["images"][0])
            if VARIANTS[variant] is not None:
                share = receipt_of(picture_of(server, saved[-1]), "clear", LAKE.sites)["share_linearized"]
        server.run(sampling_only(workflow_for(VARIANTS[variant], CAPTIONS[0], timed_size, 1)), SECONDS)
        return saved, share, memory.stop()


def time_steps(server: LiveServer, size: int) -> dict[str, tuple[float, float]]:
    """Return each variant's seconds per step at a size and the share of pairs it kept; the fastest of the turns."""
    found: dict[str, tuple[float, float]] = {}
    for turn in range(TURNS):
        for variant, radius in VARIANTS.items():  # a new seed, or the server's cache answers
            workflow = workflow_for(radius, CAPTIONS[0], size, TIMED_STEPS, seed=100 * size + turn)
            _, seconds = server.measure(sampling_only(workflow), SECONDS)
            kept = 1.0
            if radius is not None:  # the picture of the sampling that was timed, which the server's cache has
                outputs, _ = server.measure(workflow, SECONDS)
                picture = picture_of(server, outputs["SaveImage"]["images"][0])
                kept = receipt_of(picture, "clear", LAKE.sites)["share_of_pairs"]
            found[variant] = min(found.get(variant, (float("inf"), kept)), (seconds / TIMED_STEPS, kept))
    return found


def measure(
    server: LiveServer, saved: dict[str, list[dict[str, str]]], variant: str
) -> tuple[float, float, list[Image.Image]]:
    """Return mean PSNR and SSIM against dense, as Compare with Teacher gives them, and its difference pictures."""
    psnr, ssim, maps = [], [], []
    for picture, teacher in zip(saved[variant], saved["dense"], strict=True):
        outputs, _ = server.measure(comparison(picture, teacher), SECONDS)
        for values, value in zip((psnr, ssim), measures_of(outputs), strict=True):
            values.append(value)
        sheet = picture_of(server, outputs["LinearizeCompare"]["images"][0]).convert("RGB")
        maps.append(sheet.crop((sheet.width - SIZE, sheet.height - SIZE, sheet.width, sheet.height)))
    return sum(psnr) / len(psnr), sum(ssim) / len(ssim), maps


def save_pictures(pictures: dict[str, list[Image.Image]]) -> None:
    """Save the pictures, and a sheet with one row per caption and one column per key."""
    sheet = Image.new("RGB", (CELL * len(pictures), (CELL + 22) * len(CAPTIONS) + 22), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, row) in enumerate(pictures.items()):
        draw.text(
            (column * CELL + 6, 4),
            name.replace("_", " radius ", 1).replace("_", " ").replace("difference", "difference x 8"),
            fill="black",
        )
        for line, picture in enumerate(row):
            picture.save(OUTPUT / f"{name}_{line + 1}.png")
            sheet.paste(
                picture.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS),
                (column * CELL + 2, line * (CELL + 22) + 22),
            )
            if column == 0:
                draw.text((6, (line + 1) * (CELL + 22) + 2), CAPTIONS[line], fill="black")
    sheet.save(OUTPUT / "sheet.png")


def print_table(rows: list[Row], sizes: tuple[int, ...], seconds: float) -> None:
    """Print the rows for a person and write them to table.json."""
    heads = "".join(f" {f's/step {size}':>12}" for size in sizes) + "".join(f" {f'pairs {size}':>11}" for size in sizes)
    print(f"\n{'attention':10}{heads} {'PSNR':>9} {'SSIM':>6} {'mirror':>7} {'linearized':>11} {'memory':>10}")
    for row in rows:
        times = "".join(f" {row.seconds[str(size)]:12.3f}" for size in sizes)
        pairs = "".join(f" {row.pairs[str(size)]:11.1%}" for size in sizes)
        psnr = "-" if row.psnr is None else f"{row.psnr:.1f} dB"
        ssim = "-" if row.ssim is None else f"{row.ssim:.3f}"
        print(
            f"{row.variant:10}{times}{pairs} {psnr:>9} {ssim:>6} {row.reflection:7.2f} {row.share_linearized:11.0%}"
            f" {row.memory_mib:6.0f} MiB"
        )
    print(
        f"Pictures: {SIZE} x {SIZE} pixels, {STEPS} steps, {len(CAPTIONS)} captions, untrained windows. PSNR and SSIM"
        " are against dense.\nMirror is how well the lake repeats the land, 1 at best. Seconds count no decoding."
    )
    table = {
        "size": SIZE,
        "steps": STEPS,
        "sizes": list(sizes),
        "text": TEXT_TOKENS,
        **told(seconds),
        "rows": list(map(asdict, rows)),
    }
    (OUTPUT / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def run_demo(timed_size: int) -> None:
    """Paint, compare and time every variant, then write pictures and table."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start, sizes = time.monotonic(), tuple(dict.fromkeys((SIZE, timed_size)))
    saved, share, memory, times = {}, {}, {}, {}
    for variant in VARIANTS:
        print(f"starting ComfyUI; painting {len(CAPTIONS)} pictures: {variant} ...", flush=True)
        saved[variant], share[variant], memory[variant] = paint(variant, timed_size)
    with live_server() as server:
        server.run(workflow_for(4, CAPTIONS[0], SIZE, 1), SECONDS)  # loads the models
        for size in sizes:
            print(f"timing {TIMED_STEPS} steps at {size} x {size} pixels ...", flush=True)
            times[str(size)] = time_steps(server, size)
        rows, pictures = [], {}
        for variant in VARIANTS:
            pictures[variant] = [picture_of(server, each).convert("RGB") for each in saved[variant]]
            pixels = torch.from_numpy(np.stack([np.asarray(each) for each in pictures[variant]])).permute(0, 3, 1, 2)
            mirror = reflection(pixels / 255).mean().item()
            psnr = ssim = None
            if variant != "dense":
                psnr, ssim, pictures[f"{variant}_difference"] = measure(server, saved, variant)
            seconds, pairs = ({size: found[variant][part] for size, found in times.items()} for part in (0, 1))
            rows.append(Row(variant, seconds, pairs, share[variant], psnr, ssim, mirror, memory[variant]))
    save_pictures(pictures)
    print_table(rows, sizes, time.monotonic() - start)
    print(f"\nThe pictures are in {OUTPUT.relative_to(ROOT)}: open sheet.png there to see them side by side.")


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
