"""The demo: dense and linearized pictures from a real ComfyUI server, and a table of what each cost.

`python run.py demo` calls it inside `.venv`. It queues the shipped workflow `demo/api/clear_demo.json` three times on a
tiny FLUX with random weights, with the same seed: dense, then CLEAR at two radii.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import psutil
from live_server import ROOT, LiveServer, ServerProblem, live_server
from PIL import Image, ImageDraw

WORKFLOW = ROOT / "demo" / "api" / "clear_demo.json"
OUTPUT = ROOT / "demo" / "output"
VARIANTS = {"dense": None, "clear_16": 16, "clear_8": 8}  # radius in tokens
SECONDS = 3600  # the longest that one run may take
AMPLIFY = 16  # difference pictures
CELL = 384  # pixels per picture of the sheet


@dataclass(frozen=True)
class Row:
    """What one variant cost and how far its picture is from the dense one.

    Args:
        seconds_per_step: of the whole job; the faster run where there are two.
        share_linearized: share of attention calls that ran on CLEAR, 0 to 1.
        pairs_kept: share of the query-key pairs of dense attention, 0 to 1.
        psnr: in dB against the dense picture; None for dense itself and for equal pictures.
        memory_mib: the most memory that the server's process held during the run.
    """

    variant: str
    seconds_per_step: float
    share_linearized: float
    pairs_kept: float
    psnr: float | None
    memory_mib: float


def variant_workflow(radius: int | None, size: int, steps: int, seed: int = 1) -> dict[str, Any]:
    """Return the shipped workflow at a size; a radius of None takes the CLEAR node out."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    ids = {node["class_type"]: key for key, node in workflow.items()}
    workflow[ids["EmptySD3LatentImage"]]["inputs"].update(width=size, height=size)
    workflow[ids["LinearizeReport"]]["inputs"].update(width=size, height=size)
    workflow[ids["KSampler"]]["inputs"].update(steps=steps, seed=seed)
    workflow[ids["SaveImage"]]["inputs"]["filename_prefix"] = f"linearize/demo_{radius or 'dense'}"
    clear = workflow[ids["LinearizeCLEAR"]]["inputs"]
    if radius is not None:
        clear["radius"] = radius
        return workflow
    del workflow[ids["LinearizeCLEAR"]]
    for node in workflow.values():
        if node["inputs"].get("model") == [ids["LinearizeCLEAR"], 0]:
            node["inputs"]["model"] = clear["model"]
    return workflow


@contextlib.contextmanager
def peak_memory(process: subprocess.Popen) -> Iterator[list[int]]:
    """Yield a list whose one element grows to the most bytes the process held while the block ran."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        with contextlib.suppress(psutil.Error):
            watched = psutil.Process(process.pid)
            while True:
                peak[0] = max(peak[0], watched.memory_info().rss)
                if done.wait(0.02):
                    return

    threading.Thread(target=sample, daemon=True).start()
    try:
        yield peak
    finally:
        done.set()


def what_ran(report: str) -> tuple[float, float]:
    """Return the shares linearized and kept that an Attention Report names.

    Raises:
        ServerProblem: a site did not run on CLEAR.
    """
    planned, _, ran = report.partition("in the last sampling:")
    sites = re.search(r"(\d+) sites?:", planned)
    shares = re.search(r"(\d+)% linearized, ([\d.]+)% of pairs kept", ran)
    kinds = re.findall(r"^(\w+) \(\w+\): (\d+) sites?$", ran, flags=re.MULTILINE)
    on_clear = sum(int(number) for kind, number in kinds if kind == "clear")
    if not (sites and shares and shares[1] == "100" and on_clear == int(sites[1])):
        raise ServerProblem(f"Not every attention site ran on CLEAR; its Attention Report says:\n{ran or report}")
    return int(shares[1]) / 100, float(shares[2]) / 100


def psnr(picture: np.ndarray, other: np.ndarray) -> float | None:
    """Return the peak signal-to-noise ratio of two 8-bit pictures in dB, None when they are equal."""
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else None


def run_variant(
    server: LiveServer, variant: str, workflow: dict[str, Any], steps: int, dense: np.ndarray | None
) -> tuple[Row, np.ndarray]:
    """Run one variant's workflow on the server; return its row and its picture."""
    with peak_memory(server.process) as peak:
        prompt = server.queue(workflow)
        outputs = server.wait(prompt, SECONDS)
    nodes = {workflow[key]["class_type"]: output for key, output in outputs.items()}
    shares = (0.0, 1.0) if VARIANTS[variant] is None else what_ran(nodes["LinearizeReport"]["text"][0])
    picture = np.asarray(Image.open(BytesIO(server.image(nodes["SaveImage"]["images"][0]))).convert("RGB"))
    distance = None if dense is None else psnr(picture, dense)
    return Row(variant, server.seconds(prompt) / steps, *shares, distance, peak[0] / 2**20), picture


def save_pictures(pictures: dict[str, np.ndarray]) -> None:
    """Save the pictures, their differences to dense, and a sheet of all."""
    sheet = Image.new("RGB", (CELL * len(pictures), (CELL + 24) * 2), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (variant, picture) in enumerate(pictures.items()):
        Image.fromarray(picture).save(OUTPUT / f"{variant}.png")
        cells = [(variant.replace("_", ", radius "), picture)]
        if variant != "dense":
            difference = np.clip(np.abs(picture.astype(int) - pictures["dense"]) * AMPLIFY, 0, 255).astype(np.uint8)
            Image.fromarray(difference).save(OUTPUT / f"difference_{variant}.png")
            cells.append((f"|dense - {variant}| x {AMPLIFY}", difference))
        for line, (label, cell) in enumerate(cells):
            top = line * (CELL + 24)
            draw.text((column * CELL + 6, top + 6), label, fill="black")
            sheet.paste(Image.fromarray(cell).resize((CELL - 4, CELL - 4)), (column * CELL + 2, top + 24))
    sheet.save(OUTPUT / "sheet.png")


def print_table(rows: list[Row], size: int, steps: int) -> None:
    """Print the rows for a person and write them to table.json."""
    print(f"\n{'variant':10} {'s/step':>8} {'linearized':>11} {'pairs kept':>11} {'PSNR':>9} {'memory':>10}")
    for row in rows:
        distance = f"{row.psnr:.1f} dB" if row.psnr is not None else "-" if row.variant == "dense" else "equal"
        print(
            f"{row.variant:10} {row.seconds_per_step:8.2f} {row.share_linearized:11.0%} {row.pairs_kept:11.1%}"
            f" {distance:>9} {row.memory_mib:6.0f} MiB"
        )
    print(
        f"{size} x {size} pixels, {steps} steps; seconds of the whole job, memory of the server at its peak."
        "\nPSNR is against dense. The model's weights are random, so PSNR says nothing about quality here."
    )
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "torch": importlib.metadata.version("torch"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    table = {"size": size, "steps": steps, "weights": "random", **about, "rows": list(map(asdict, rows))}
    (OUTPUT / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def run_demo(size: int) -> None:
    """Run every variant at `size` pixels per side, then write pictures and table."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    steps = 4 if size <= 1024 else 2
    seeds = (1, 2) if size <= 1024 else (1,)  # a second look where it is cheap; another seed, or the cache answers
    rows, pictures = {}, {}
    print("Starting ComfyUI; one warm-up step ...", flush=True)
    with live_server() as server:
        server.run(variant_workflow(VARIANTS["clear_16"], min(size, 1024), 1), SECONDS)
        runs = [(seed, variant) for seed in seeds for variant in VARIANTS]
        for number, (seed, variant) in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {variant}, {steps} steps at {size} x {size} ...", end=" ", flush=True)
            workflow = variant_workflow(VARIANTS[variant], size, steps, seed)
            row, picture = run_variant(server, variant, workflow, steps, pictures.get("dense"))
            print(f"{row.seconds_per_step:.2f} s per step", flush=True)
            pictures.setdefault(variant, picture)
            first = rows.setdefault(variant, row)
            rows[variant] = replace(first, seconds_per_step=min(first.seconds_per_step, row.seconds_per_step))
    save_pictures(pictures)
    print_table(list(rows.values()), size, steps)
    print(f"\nThe pictures are in {OUTPUT.relative_to(ROOT)}: open sheet.png there to see them side by side.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Dense and linearized pictures from a real ComfyUI server.")
    parser.add_argument("--size", type=int, default=1024, help="pixels per side (default 1024)")
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
