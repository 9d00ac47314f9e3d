"""What README.md and README.zh.md take from stored rows and code: the demo's figures, models, pairs, quality."""

import csv
import json
import statistics
import textwrap
from pathlib import Path

from linearize.attention import ClearSpec, Segment, TokenLayout, grid_segment
from linearize.attention.hosts import HOSTS
from linearize.attention.planning.cost import clear_pairs

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence" / "results.csv"
DEMO = Path(__file__).resolve().parents[2] / "docs" / "demo.json"
PIXELS = (1024, 1536, 2048, 4096, 8192)
SPECS = (ClearSpec(8), ClearSpec(16), ClearSpec(32), ClearSpec(8, down_factor=4))
UNTRAINED = EVIDENCE.with_name("untrained.csv")
FOVEATED = (  # question and method of what needs no training, and their names in both languages
    ("pictures", "foveated top=0.1 tile=4", "picture: foveated, {keys} of the keys", "图像：注视，{keys} 的键"),
    ("clips", "foveated top=0.22 tile=2 frames=5", "clip: foveated, {keys} of the keys", "视频：注视，{keys} 的键"),
)
QUALITY = (  # suite and method of the evidence, and their names in both languages
    ("methods", "clear r=4", "picture: windows, radius 4", "图像：窗口，半径 4"),
    ("methods", "clear r=12", "picture: windows, radius 12", "图像：窗口，半径 12"),
    ("methods", "clear r=4 pooled 2", "picture: windows, radius 4, and pooled keys", "图像：窗口，半径 4，加池化键"),
    ("methods", "hybrid R=4 polynomial max", "picture: hybrid, every 4th key exact", "图像：混合，每 4 个键 1 个精确"),
    ("video", "clear 3-D r=4", "clip: windows, radius 4", "视频：窗口，半径 4"),
    ("video", "hybrid R=2 polynomial max", "clip: hybrid, every 2nd key exact", "视频：混合，每 2 个键 1 个精确"),
    ("video", "chunked 2 overlap 1", "clip: chunks of 2 frames, overlap 1", "视频：2 帧一块，重叠 1 帧"),
)


def demo_sentence() -> str:
    """Return what the demo's picture shows, with the figures of the run that made it."""
    _, foveated, clear = _demo_figures()
    text = (
        f"*Same captions, same seeds; nothing is trained. Left: dense attention. Middle: Foveated Attention with `keep`"
        f" 0.15, {foveated['pairs']} of the query-key pairs; {foveated['psnr']} dB from the left (PSNR, mean of three"
        f" captions). Right: windows of radius 8, {clear['pairs']} of the pairs, {clear['psnr']} dB.*"
    )
    return "\n".join(textwrap.wrap(text, 120))


def demo_sentence_zh() -> str:
    """Return the same in Chinese."""
    _, foveated, clear = _demo_figures()
    return (
        f"*提示词相同，种子相同，都未经训练。左：稠密注意力。中：注视注意力，`keep` 为 0.15，"
        f"计算 {foveated['pairs']} 的查询-键对，与左图的 PSNR（三条提示词的平均）为 {foveated['psnr']} dB。"
        f"右：半径 8 的窗口，{clear['pairs']} 的查询-键对，{clear['psnr']} dB。*"
    )


def _demo_figures() -> list[dict[str, str]]:
    """Return the demo's rows in the order of the picture: share of pairs and PSNR as text."""
    data = json.loads(DEMO.read_text(encoding="utf-8"))
    assert [row["variant"] for row in data["rows"]] == ["dense", "foveated, keep 0.15", "clear, radius 8"]
    size = str(data["size"])
    return [
        {"pairs": f"{row['pairs'][size]:.0%}".replace("%", " %"), "psnr": f"{row['psnr'] or 0:.1f}"}
        for row in data["rows"]
    ]


def models_line() -> str:
    """Return the names of all hosts, in the order in which they are tried."""
    return "\n".join(textwrap.wrap(", ".join(host.title for host in HOSTS) + ".", 120, break_on_hyphens=False))


def pairs_table(heads: tuple[str, ...] = ("pixels a side", "tokens (256 text)", "radius")) -> str:
    """Return the share of pairs that CLEAR keeps on FLUX.1, exact counts at 256 and 512 text tokens.

    Args:
        heads: words for the size, the number of tokens and the radius.
    """
    names = [f"{heads[2]} {spec.radius}" + (", `down_factor` 4" if spec.down_factor > 1 else "") for spec in SPECS]
    lines = [f"| {' | '.join([*heads[:2], *names])} |", "|" + "---:|" * (len(names) + 2)]
    for pixels in PIXELS:
        side = pixels // 16
        layouts = [TokenLayout.of((Segment("text", t), grid_segment("main", 1, side, side))) for t in (256, 512)]
        cells = []
        for spec in SPECS:
            shares = [clear_pairs(spec, layout) / layout.num_tokens**2 for layout in layouts]
            cells.append(" / ".join(f"{share:.1%}".replace("%", " %") for share in shares))
        lines.append(f"| {pixels} | {layouts[0].num_tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs_table_zh() -> str:
    """Return the same in Chinese."""
    return pairs_table(("每边像素", "token 数（文本 256）", "半径"))


def quality_table(heads: tuple[str, ...] = ("attention of every site", "untrained, dB", "trained, dB")) -> str:
    """Return PSNR against dense attention before and after all training, means over seeds, from the evidence's rows.

    Args:
        heads: of the columns, in English or in Chinese.
    """
    with EVIDENCE.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["note"] and float(row["scale"]) == 1]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|", *_foveated_lines(heads[0].isascii())]
    for suite, method, english, chinese in QUALITY:
        cells = [english if heads[0].isascii() else chinese]
        for training in ("untrained", "all stages"):
            key = (suite, method, training)
            newest = {row["seed"]: row for row in rows if (row["suite"], row["method"], row["training"]) == key}
            cells.append(f"{statistics.fmean(float(row['psnr']) for row in newest.values()):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _foveated_lines(is_english: bool) -> list[str]:
    """Return the lines of foveated attention, which was not trained there: PSNR, means over seeds of noise."""
    with UNTRAINED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for question, method, *names in FOVEATED:
        found = [row for row in rows if (row["question"], row["method"]) == (question, method)]
        psnr, keys = (statistics.fmean(float(row[name]) for row in found) for name in ("psnr", "keys"))
        name = names[0 if is_english else 1].format(keys=f"{keys:.0%}".replace("%", " %"))
        lines.append(f"| {name} | {psnr:.1f} | |")
    return lines


def quality_table_zh() -> str:
    """Return the same in Chinese."""
    return quality_table(("所有位置的注意力", "未训练，dB", "训练后，dB"))
