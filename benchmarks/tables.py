"""Write README's tables from stored results: `python benchmarks/tables.py`.

A table is the newest run of each case in results.csv; the demo's is `docs/demo.json`, which `--demo` takes over, with
its pictures, from the last `run.py demo` and `run.py test --only browser`. No number enters README by hand.
"""

import csv
import importlib
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# `python benchmarks/tables.py` needs no checkout on the path, and its nodes/ would hide ComfyUI's nodes.py
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

from linearize.attention import ClearSpec, Segment, TokenLayout, grid_segment  # noqa: E402
from linearize.attention.cost import clear_pairs  # noqa: E402
from linearize.attention.hosts import HOSTS  # noqa: E402
from linearize.attention.hosts.unhookable import UNHOOKABLE  # noqa: E402

README = ROOT / "README.md"
DEMO = ROOT / "docs" / "demo.json"
PICTURES = {"sheet.png": "demo_sheet.jpg", "browser.png": "demo.png"}  # of demo/output: name in docs
MEASURES = (("psnr", 1), ("ssim", 3), ("reflection", 2))  # of a row of the demo's table: digits


def newest(suite: str) -> list[dict[str, str]]:
    """Return the newest row of each case of a suite, in stored order."""
    with (ROOT / "benchmarks" / "results.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] == suite]
    cases = {(row["pixels"], row["text"], row["heads"], row["dtype"], row["contender"]): row for row in rows}
    return list(cases.values())


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
        f"{first['machine']}, torch {first['torch']}, {first['date']}, commit {first['commit']}.",
        "Median of interleaved turns; only the ratios mean something. Peak memory is beyond the inputs.",
        declined_sentence(),
    ]
    return "\n".join(lines)


def clear_gpu_table() -> str:
    """Return time, rate and memory of CLEAR against dense attention on GPUs, one line per case and contender."""
    with (ROOT / "benchmarks" / "results.csv").open(encoding="utf-8") as file:
        suites = dict.fromkeys(row["suite"] for row in csv.DictReader(file) if row["suite"].startswith("clear-gpu"))
    rows = [row for suite in suites for row in newest(suite)]
    if not rows:
        return "Not measured yet. `benchmarks/gpu.md` lists what wants a GPU, each a command."
    heads = ["pixels", "text", "attention", "pass", "ms", "times dense", "useful TFLOP/s", "of roofline", "peak MiB"]
    lines = [f"| {' | '.join(heads)} |", "|---:|---:|---|---|" + "---:|" * 5]
    for row in rows:
        values = (row["pixels"], row["text"], row["contender"], row["pass"], row["median_ms"], row["times_dense"],
                  row["useful_tflops"], row["of_roofline"], row["peak_mib"])  # fmt: skip
        lines.append(f"| {' | '.join(values)} |")
    first = rows[0]
    about = f"{first['machine']}, torch {first['torch']}, {first['date']}, commit {first['commit']}"
    return "\n".join([*lines, "", f"{about}; 24 heads of 128, bfloat16."])


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
        name = row["variant"].replace("_", ", radius ")
        costs = " | ".join(f"{row['seconds'][size]:.2f} ({row['pairs'][size]:.0%})" for size in sizes)
        measures = " | ".join("" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in MEASURES)
        lines.append(f"| {name} | {costs} | {measures} | {row['memory_mib']:.0f} |")
    lines += [
        "",
        f"Pictures of {data['size']} x {data['size']} pixels, {data['steps']} steps. {data['machine']},",
        f"ComfyUI on {data['device']}, torch {data['torch']}, {data['date']}, commit {data['commit']}; the whole demo",
        f"took {data['seconds']} s. MiB is the peak of a server's process; pairs are of {data['text']} text tokens.",
    ]
    return "\n".join(lines)


def pairs_table() -> str:
    """Return the share of pairs that CLEAR keeps on FLUX.1, exact counts at 256 and 512 text tokens."""
    specs = (ClearSpec(8), ClearSpec(16), ClearSpec(32), ClearSpec(8, down_factor=4))
    lines = [
        "| pixels a side | tokens (256 text) | radius 8 | radius 16 | radius 32 | radius 8, `down_factor` 4 |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for pixels in (1024, 1536, 2048, 4096, 8192):
        side = pixels // 16
        layouts = [TokenLayout.of((Segment("text", t), grid_segment("main", 1, side, side))) for t in (256, 512)]
        cells = []
        for spec in specs:
            shares = [clear_pairs(spec, layout) / layout.num_tokens**2 for layout in layouts]
            cells.append(" / ".join(f"{share:.1%}".replace("%", " %") for share in shares))
        lines.append(f"| {pixels} | {layouts[0].num_tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hosts_table() -> str:
    """Return what each host serves and what its tests cover, from the adapters and the families of `tests/hosts`."""
    sys.path.append(str(ROOT / "tests" / "hosts"))
    families = importlib.import_module("families").collect()
    lines = ["| host | models | sites | tested | notes |", "|---|---|---|---|---|"]
    for host in HOSTS:
        mine = [family for family in families if family.host == host.name]
        cases = [(name, case) for family in mine for name, case in family.cases.items()]
        models = " ".join((sys.modules[type(host).__module__].__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        groups = dict.fromkeys(site.rpartition(".")[0] for family in mine for site in family.sites)
        tested = f"{len(cases)} cases, {len(mine)} tiny model{'s' if len(mine) > 1 else ''}"
        notes = "sequence: " + ", ".join(dict.fromkeys(role for _, case in cases for role, _, _ in case.segments))
        dense = dict.fromkeys(name for name, case in cases if case.declines)
        notes += f"; stays dense: {', '.join(dense)}" if dense else ""
        sites = ", ".join(f"`{group}`" for group in groups)
        lines.append(f"| {host.title} | {models} | {sites} | {tested} | {notes} |")
    meaning = (
        "A case is one forward of a tiny random model of ComfyUI 0.30.0's own class, on the CPU: every attention call,"
        " its layout to the token, and windows against dense attention. What is not `main` is global. Released weights"
        f" and GPUs were not tested. Refused with the reason: {', '.join(kind.title for kind in UNHOOKABLE)}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(meaning, 120)])


TABLES = {
    "clear-cpu": clear_cpu_table,
    "clear-gpu": clear_gpu_table,
    "demo": demo_table,
    "hosts": hosts_table,
    "pairs": pairs_table,
}


def with_tables(text: str) -> str:
    """Return README's text with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no place for table {name}")
        table = make()
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def take_over_demo() -> None:
    """Copy what the last `run.py demo`, and the last browser test, wrote to `demo/output` into `docs`."""
    shutil.copy(ROOT / "demo" / "output" / "table.json", DEMO)
    for source, target in PICTURES.items():
        picture = Image.open(ROOT / "demo" / "output" / source).convert("RGB")
        picture.save(DEMO.parent / target, quality=88, optimize=True)


def main() -> None:
    if "--demo" in sys.argv:
        take_over_demo()
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
