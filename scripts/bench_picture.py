"""Draw docs/benchmarks.png from the tables of docs/benchmarks.md: this project beside its peers.

python scripts/bench_picture.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dora_serve.rankmap.palette import FULL, SCALE

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Title, unit, the column's number, and of which rows: as they begin in the table → as shown.
PANELS = (
    ("Merge of 1.1 B parameters, shorter is better", "seconds", 2, {
        "dora-export merge | 1.07": "dora-export", "PEFT merge_and_unload": "PEFT",
    }),
    ("Memory of that merge, shorter is better", "megabytes", 5, {
        "dora-export merge | 1.07": "dora-export", "PEFT merge_and_unload": "PEFT",
    }),
    ("A step of 8 rows with 8 adapters, shorter is better", "milliseconds", 2, {
        "ours, 8 adapters | 1505": "dora-serve", "PEFT mixed batch": "PEFT, mixed batch",
    }),
    ("Chats of 8 clients, longer is better", "tokens a second", 3, {
        "ours, 8 adapters | 8": "dora-serve, 8 adapters", "vLLM, 8 adapters | 8":
        "vLLM, 8 adapters", "ours, merged | 8": "dora-serve, merged", "vLLM, merged | 8":
        "vLLM, merged", "transformers serve, continuous | 8": "transformers serve, merged",
    }),
)  # fmt: skip


def number(table: str, row: str, column: int) -> float:
    """What stands in `column` of the one row that begins so. Raises `ValueError` for none, or
    several."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row}"))
    return float(line.split("|")[1 + column].replace(",", ""))


def draw(panel: Axes, title: str, unit: str, bars: dict[str, float]) -> None:
    colors = [FULL if name.startswith("dora") else SCALE[2] for name in bars]
    drawn = panel.barh(list(bars), list(bars.values()), color=colors)
    panel.bar_label(drawn, [f"{value:,.4g}" for value in bars.values()], padding=4, fontsize=9)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(unit, fontsize=9)
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    table = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    heights = [2, len(PANELS[-1][-1])]
    panels = figure.subplots(2, 2, height_ratios=heights).flatten()
    for panel, (title, unit, column, rows) in zip(panels, PANELS, strict=True):
        bars = {shown: number(table, row, column) for row, shown in rows.items()}
        draw(panel, title, unit, bars)
    figure.suptitle("Two cores, 24 GB, no GPU; the tables below say how", fontsize=11)
    figure.savefig(DOCS / "benchmarks.png", dpi=110)


if __name__ == "__main__":
    main()
