"""Write README's tables from stored results: `python benchmarks/tables.py`.

A table is the newest run of each case in results.csv; the demo's is `docs/demo.json`, which `--demo` takes over from
the last `run.py demo`. No number enters README by hand.
"""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `python benchmarks/tables.py` needs no checkout on the path, and its nodes/ would hide ComfyUI's nodes.py
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

from linearize.attention import ClearSpec, Segment, TokenLayout, grid_segment  # noqa: E402
from linearize.attention.cost import clear_pairs  # noqa: E402

README = ROOT / "README.md"
DEMO = ROOT / "docs" / "demo.json"


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
    lines = ["| attention | s a step | pairs kept | memory of the server, MiB |", "|---|---:|---:|---:|"]
    for row in data["rows"]:
        name = row["variant"].replace("_", ", radius ")
        lines.append(f"| {name} | {row['seconds_per_step']:.2f} | {row['pairs_kept']:.1%} | {row['memory_mib']:.0f} |")
    lines += [
        "",
        f"{data['size']} x {data['size']} pixels, {data['steps']} steps, {data['weights']} weights, {data['machine']},",
        f"ComfyUI on the CPU, torch {data['torch']}, {data['date']}, commit {data['commit']}.",
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


TABLES = {"clear-cpu": clear_cpu_table, "demo": demo_table, "pairs": pairs_table}


def with_tables(text: str) -> str:
    """Return README's text with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no place for table {name}")
        table = make()
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> None:
    if "--demo" in sys.argv:
        shutil.copy(ROOT / "demo" / "output" / "table.json", DEMO)
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
