"""Write the tables of all documents from stored results and code: `python -m lab.benchmarks.tables`.

A table of times is the newest run of each case in results.csv. Options first copy stored results into `docs/`:

- `--demo`: from the last `run.py demo` and `run.py test --only browser`, the table `demo.json` and its pictures;
- `--distill`: from the last `run.py demo --distill` of each model, `distill_*.json` and the sheets;
- `--templates`, `--hosts`: from the last `run.py test --only templates`, or hosts, `templates.json` or `hosts.json`.

No number enters a document by hand.
"""

import csv
import json
import re
import shutil
import sys
import textwrap
from dataclasses import replace

from PIL import Image

from linearize.attention import attention_cost
from linearize.attention.hosts import HOSTS
from linearize.attention.hosts.unhookable import UNHOOKABLE

from .. import ROOT
from . import front, tree
from .registry import STREAMS, SUITES, Shape

RESULTS = ROOT / "lab" / "benchmarks" / "results.csv"
DEMO = ROOT / "docs" / "demo.json"
DISTILL = (ROOT / "docs" / "distill_lake.json", ROOT / "docs" / "distill_clips.json")
TEMPLATES, TESTED = ROOT / "docs" / "templates.json", ROOT / "docs" / "hosts.json"
OUTPUT = ROOT / "lab" / "demo" / "output"
PICTURES = {  # of OUTPUT: name in docs; of the browser's the first, which is of the frontend that is installed
    "sheet.png": "demo_sheet.jpg", "front.png": "demo_front.jpg", "browser-*.png": "demo.png",
}  # fmt: skip
GRAPH = (230, 230, 1690, 765)  # where the nodes lie in the browser's picture
MEASURES = (("psnr", 1), ("ssim", 3), ("reflection", 2))  # of a row of the demo's table: digits

CASE = ("pixels", "frames", "text", "heads", "head_dim", "dtype", "batch", "pass", "contender")  # makes rows comparable


def stored() -> list[dict[str, str]]:
    """Return every row ever taken, in stored order."""
    with RESULTS.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def newest(suite: str) -> list[dict[str, str]]:
    """Return the newest row of each case of a suite, in the order of first rows."""
    return list({tuple(row[each] for each in CASE): row for row in stored() if row["suite"] == suite}.values())


def origin(row: dict[str, str]) -> str:
    """Return where, with what and when a row was taken."""
    return f"{row['machine']}, torch {row['torch']}, {row['date']}, commit {row['commit']}"


def sides(shape: Shape) -> str:
    """Return the size of frames for people: "832 x 480"."""
    return shape.pixels.replace("x", " x ")


def clear_cpu_table() -> str:
    """Return time and memory of CLEAR against dense attention on a CPU."""
    rows = newest("clear-cpu")
    lines = ["| pixels a side | attention | ms a call | times dense | peak MiB |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        ratio = "" if row["contender"] == "dense" else f"{float(row['times_dense']):.1f}"
        lines.append(f"| {row['pixels']} | {row['contender']} | {row['median_ms']} | {ratio} | {row['peak_mib']} |")
    first = rows[0]
    lines += [
        "",
        f"One head of {first['head_dim']}, {first['text']} text tokens, {first['dtype']}, forward. A shared machine:",
        f"{origin(first)}.",
        "Median of interleaved turns; only the ratios mean something. Peak memory is beyond the inputs.",
        declined_sentence(),
    ]
    return "\n".join(lines)


def foveated_cpu_table() -> str:
    """Return time, pairs and memory of foveated attention against dense attention on a CPU."""
    suite, rows = SUITES["foveated-cpu"], newest("foveated-cpu")
    found = {(row["pixels"], row["contender"]): row for row in rows}
    lines = [
        "| pixels a side | attention | pairs | ms a call | times dense | peak MiB |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for shape in suite.shapes:
        for name, (_, spec) in suite.contenders.items():
            row = found[shape.pixels, name]
            pairs = attention_cost(spec, shape.layout, 1, shape.head_dim).pairs / shape.layout.num_tokens**2
            ratio = "" if spec.is_dense else f"{float(row['times_dense']):.1f}"
            cells = [
                shape.pixels,
                name.removeprefix("torch "),
                f"{pairs:.1%}",
                row["median_ms"],
                ratio,
                row["peak_mib"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    meaning = (
        f"One head of {rows[0]['head_dim']}, {rows[0]['text']} text tokens, {rows[0]['dtype']}, forward, the choice of"
        f" tiles included; top 0.0857 and 0.0146 are keep 0.1 and 0.03. Median of turns on a shared machine; only the"
        f" ratios mean something. Peak memory is beyond the inputs, the output included. {origin(rows[-1])}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(meaning, 120)])


def mapped_cpu_table() -> str:
    """Return time and memory of linear, hybrid and chunked attention against dense attention on a CPU."""
    suite, rows = SUITES["mapped-cpu"], newest("mapped-cpu")
    times = {(row["frames"], row["contender"]): row for row in rows}
    shapes, longest = [str(shape.frames) for shape in suite.shapes], suite.shapes[-1]
    heads = ["attention", "pairs", *(f"times dense, {frames} frames" for frames in shapes), "peak MiB"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, (_, spec) in suite.contenders.items():
        pairs = attention_cost(spec, longest.layout, 1, longest.head_dim).pairs / longest.layout.num_tokens**2
        ratios = [f"{float(times[frames, name]['times_dense']):.1f}" for frames in shapes]
        words = name.removeprefix("torch ").replace("rate=", "rate ")
        cells = [words, f"{pairs:.0%}", *ratios, times[shapes[-1], name]["peak_mib"]]
        lines.append(f"| {' | '.join(cells)} |")
    dense = [f"{float(times[frames, 'dense']['median_ms']):.0f}" for frames in shapes]
    tokens = [f"{shape.layout.num_tokens:,}" for shape in suite.shapes]
    meaning = (
        f"A video of {sides(longest)} pixels and {' or '.join(shapes)} latent frames, {' or '.join(tokens)} tokens;"
        f" one head of {longest.head_dim}, {longest.dtype}, forward, untrained maps. Dense attention took"
        f" {' and '.join(dense)} ms. Pairs, the share of exact ones, and peak memory beyond the inputs are those of"
        f" {shapes[-1]} frames. Median of interleaved turns on a shared machine: {origin(rows[-1])}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(meaning, 120)])


def stream_table() -> str:
    """Return the memory of a causal clip, whole at once and as a stream, by its number of frames."""
    suite, rows = STREAMS["stream"], newest("stream")
    heads = ["latent frames", "tokens", "at once, peak MiB", "stream, peak MiB", "stream holds, MiB"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for frames in suite.frames:
        mine = {row["contender"].split()[0]: row for row in rows if row["frames"] == str(frames)}
        tokens = replace(suite.shape, frames=frames).layout.num_tokens
        cells = [mine["direct"]["peak_mib"], mine["stream"]["peak_mib"], mine["stream"]["held_mib"]]
        lines.append(f"| {frames} | {tokens:,} | {' | '.join(cells)} |")
    shape, spec = suite.shape, suite.spec
    meaning = (
        f"Causal chunks of {spec.chunk_frames} frames with an overlap of {spec.overlap_frames}, {sides(shape)} pixels,"
        f" one head of {shape.head_dim}, {shape.dtype}, inputs and output counted: growth of the peak resident set of a"
        f" process of its own, whose allocator returns what is freed. {origin(rows[-1])}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(meaning, 120)])


def gpu_table() -> str:
    """Return time, rate and memory of the suites for GPUs against dense attention, one line per case and contender."""
    suites = dict.fromkeys(row["suite"] for row in stored() if "-gpu" in row["suite"])
    rows = [row for suite in suites for row in newest(suite)]
    if not rows:
        return "Not measured yet. `lab/benchmarks/gpu.md` lists what needs a GPU, each a command."
    columns = {"pixels": "pixels", "frames": "frames", "text": "text", "heads": "heads", "contender": "attention",
               "pass": "pass", "median_ms": "ms", "times_dense": "times dense", "useful_tflops": "useful TFLOP/s",
               "of_roofline": "of roofline", "peak_mib": "peak MiB"}  # fmt: skip
    lines = [f"| {' | '.join(columns.values())} |", "|---:|---:|---:|---:|---|---|" + "---:|" * 5]
    lines += [f"| {' | '.join(row[each] for each in columns)} |" for row in rows]
    return "\n".join([*lines, "", f"{origin(rows[0])}; head dimension {rows[0]['head_dim']}, {rows[0]['dtype']}."])


def declined_sentence() -> str:
    """Return what a call costs that the override leaves to the host."""
    times = {row["contender"]: float(row["median_ms"]) * 1000 for row in newest("declined")}
    added = {name: time - times["host alone"] for name, time in times.items()}
    return (
        f"A call that falls back to dense attention costs {added['declined']:.1f} microseconds more, one that a setting"
        f"\nkeeps dense {added['left to host']:.1f}, one that no plan names {added['other call']:.1f} (median)."
    )


def demo_table() -> str:
    """Return the demo's own table."""
    data = json.loads(DEMO.read_text(encoding="utf-8"))
    sizes = [str(size) for size in data["sizes"]]
    heads = [*(f"s a step at {size} (pairs)" for size in sizes), "PSNR, dB", "SSIM", "mirror", "MiB"]
    lines = [f"| attention | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in data["rows"]:
        costs = " | ".join(f"{row['seconds'][size]:.2f} ({row['pairs'][size]:.0%})" for size in sizes)
        measures = " | ".join("" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in MEASURES)
        lines.append(f"| {row['variant']} | {costs} | {measures} | {row['memory_mib']:.0f} |")
    lines += [
        "",
        f"Pictures of {data['size']} x {data['size']} pixels, {data['steps']} steps. {data['machine']},",
        f"ComfyUI on {data['device']}, torch {data['torch']}, {data['date']}, commit {data['commit']}; the whole demo",
        f"took {data['seconds']} s. MiB is the peak of a server's process; pairs are of {data['text']} text tokens.",
    ]
    return "\n".join(lines)


def calibration_text() -> str:
    """Return what Calibrate Attention said in the demo."""
    data = json.loads(DEMO.read_text(encoding="utf-8"))
    size = data["sizes"][-1]
    return f"At {size} x {size} pixels:\n\n```\n{data['calibration']}\n```"


def distill_table() -> str:
    """Return what the distillation demos gained, a table per model."""
    return "\n\n".join(_distill_part(json.loads(path.read_text(encoding="utf-8"))) for path in DISTILL)


def _distill_part(data: dict) -> str:
    heads = ["error untrained", "after stage 1", "fine-tuned", "PSNR untrained, dB", "student, dB"]
    lines = [f"| {data['title']} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in data["rows"]:
        errors = " | ".join(f"{error:.2%}" for error in row["error"])
        psnr = " | ".join(f"{each:.1f}" for each in row["psnr"])
        lines.append(f"| {row['kind']} | {errors} | {psnr} |")
    mixture = data["mixture"]
    size = f"{mixture['width']} x {mixture['height']}" + (f" x {mixture['frames']}" if mixture["frames"] > 1 else "")
    meaning = (
        f"All {data['sites']} sites are replaced. Error is the relative energy of the velocity's error on held-out"
        f" samples, PSNR the mean to the teacher's {data['pictures']} pictures or clips at equal noise. The workflow as"
        f" shipped mixes the kinds, planned for {size} at {mixture['budget']:.0%} of dense attention:"
        f" {mixture['psnr']:.1f} dB at the size of the demo, {mixture['seconds']:.0f} s from prompts to pictures."
        f" {data['machine']}, ComfyUI on {data['device']}, torch {data['torch']}, {data['date']}, commit"
        f" {data['commit']}; all of it took {data['seconds']} s."
    )
    return "\n".join([*lines, "", *textwrap.wrap(meaning, 120)])


def hosts_table() -> str:
    """Return what each host serves and what its tests cover, from the adapters and what the tests told."""
    tested = json.loads(TESTED.read_text(encoding="utf-8"))
    lines = ["| host | models | sites | tested | notes |", "|---|---|---|---|---|"]
    for host in HOSTS:
        found = tested[host.name]
        models = " ".join((sys.modules[type(host).__module__].__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        cases = f"{found['cases']} cases, {found['models']} tiny model{'s' if found['models'] > 1 else ''}"
        notes = f"sequence: {', '.join(found['sequence'])}"
        notes += f"; stays dense: {', '.join(found['dense'])}" if found["dense"] else ""
        sites = ", ".join(f"`{group}`" for group in found["sites"])
        lines.append(f"| {host.title} | {models} | {sites} | {cases} | {notes} |")
    meaning = (
        "A case is one forward of a tiny random model of ComfyUI 0.30.0's own class, on the CPU: every attention call,"
        " its layout to the token, and windows against dense attention. What is not `main` is global. Released weights"
        f" and GPUs were not tested. Refused with the reason: {', '.join(kind.title for kind in UNHOOKABLE)}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(meaning, 120)])


def templates_table() -> str:
    """Return how many of ComfyUI's official templates run on windows, in sentences."""
    data = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    running, total = data["templates"]
    hosts = ", ".join(
        f"{title} ({count[1]})" if count[0] == count[1] else f"{title} ({count[0]} of {count[1]})"
        for title, count in data["hosts"].items()
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in data["dense"].items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    dense = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in reasons.items())
    text = (
        f"{running} of {total} official templates of {len(data['hosts'])} hosts ran all sites on windows, with CLEAR"
        f" behind every model loader, tiny random models in place of files, and the template's own nodes between loader"
        f" and sampler (package `{data['package'].replace(' ', '` ')}): {hosts}. The others stay dense, and the node"
        f" says why: {dense}."
    )
    return "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False))


TABLES = {  # by name: the page on which a table stands between its marks, and what makes it
    "calibration": ("docs/demo.md", calibration_text),
    "clear-cpu": ("docs/performance.md", clear_cpu_table),
    "demo": ("docs/demo.md", demo_table),
    "distill": ("docs/demo.md", distill_table),
    "folders": ("CONTRIBUTING.md", tree.folders),
    "gpu": ("docs/performance.md", gpu_table),
    "hosts": ("docs/hosts.md", hosts_table),
    "foveated-cpu": ("docs/performance.md", foveated_cpu_table),
    "mapped-cpu": ("docs/performance.md", mapped_cpu_table),
    "front": ("README.md", front.demo_sentence),
    "front-zh": ("README.zh.md", front.demo_sentence_zh),
    "models": ("README.md", front.models_line),
    "models-zh": ("README.zh.md", front.models_line),
    "pairs": ("README.md", front.pairs_table),
    "pairs-zh": ("README.zh.md", front.pairs_table_zh),
    "quality": ("README.md", front.quality_table),
    "quality-zh": ("README.zh.md", front.quality_table_zh),
    "stream": ("docs/performance.md", stream_table),
    "templates": ("docs/hosts.md", templates_table),
    "tree": ("docs/tree.md", tree.tree),
}


def pages() -> dict[str, str]:
    """Return every page that holds tables, by its path, with the tables made anew and all other text as it is.

    Raises:
        SystemExit: a page has lost the marks of a table.
    """
    texts: dict[str, str] = {}
    for name, (page, make) in TABLES.items():
        text = texts.get(page) or (ROOT / page).read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        table = make()
        texts[page], count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"{page} has {count} places for the table {name}, not one")
    return texts


def take_over_demo() -> None:
    """Copy what the last `run.py demo`, and the last browser test, wrote to `lab/demo/output` into `docs`."""
    shutil.copy(OUTPUT / "table.json", DEMO)
    for source, target in PICTURES.items():
        picture = Image.open(min(OUTPUT.glob(source))).convert("RGB")
        picture = picture.crop(GRAPH) if target == "demo.png" else picture
        picture.save(DEMO.parent / target, quality=88, optimize=True)


def take_over_distill() -> None:
    """Copy what the last `run.py demo --distill` of each model wrote to `lab/demo/output/distill` into `docs`."""
    folder = OUTPUT / "distill"
    for target in DISTILL:
        name = target.stem.removeprefix("distill_")
        shutil.copy(folder / f"{name}.json", target)
        sheet = Image.open(folder / f"{name}.png").convert("RGB")
        sheet.save(target.with_suffix(".jpg"), quality=88, optimize=True)


def take_over_templates() -> None:
    """Copy what the last `run.py test --only templates` counted into `docs`."""
    shutil.copy(ROOT / ".comfyui" / "templates.json", TEMPLATES)


def take_over_hosts() -> None:
    """Copy what the last `run.py test --only hosts` told into `docs`."""
    shutil.copy(ROOT / ".comfyui" / "hosts.json", TESTED)


def main() -> None:
    if "--demo" in sys.argv:
        take_over_demo()
    if "--distill" in sys.argv:
        take_over_distill()
    if "--templates" in sys.argv:
        take_over_templates()
    if "--hosts" in sys.argv:
        take_over_hosts()
    for page, text in pages().items():
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
