"""What was pruned where: ranks as module kind × layer, for the terminal and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from converters.errors import visible

from .output import write_file
from .palette import FULL, TERMINAL, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from converters.fit import CurvePoint

_LAYER = re.compile(r"(.*?)\.(\d{1,9})\.(.+)")

Grid = dict[str, dict[str, dict[int, int]]]


def rank_grid(ranks: Mapping[str, int]) -> Grid:
    """`{stack: {kind: {layer: rank}}}`; encoder and decoder are stacks of their own.

    A module outside of numbered layers stands in the stack `""` at layer 0.
    """
    grid: Grid = {}
    for module, rank in ranks.items():
        match = _LAYER.fullmatch(module)
        stack, layer, kind = (match[1], int(match[2]), match[3]) if match else ("", 0, module)
        grid.setdefault(stack, {}).setdefault(kind, {})[layer] = rank
    return grid


def drawn(name: str) -> str:
    """`name` for matplotlib: signs that its font lacks by their numbers, and no formula between two
    dollars."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    signs = (c if ord(c) in known else c.encode("unicode_escape").decode() for c in visible(name))
    return "".join(signs).replace("$", r"\$")


def _cell(rank: int, largest: int) -> str:
    text = f"{rank:>4}"
    if not rank:
        return text
    color = TERMINAL[rank * (len(TERMINAL) - 1) // largest]
    return click.style(text, bg=color, fg=255 if color == TERMINAL[-1] else 16)


def terminal_map(ranks: Mapping[str, int], largest: int, columns: int | None = None) -> str:
    """The heatmap as coloured text; click takes the colours out where none can be shown. Layers
    beyond the `columns` of a terminal go on below."""
    lines = []
    for stack, kinds in rank_grid(ranks).items():
        layers = sorted({layer for row in kinds.values() for layer in row})
        width = max(len(visible(kind)) for kind in kinds)
        most = len(layers) if columns is None else max(1, (columns - width - 3) // 4)
        lines.append(click.style(visible(stack) or "outside of layers", bold=True))
        for start in range(0, len(layers), most):
            part = layers[start : start + most]
            if stack:
                lines.append(f"  {'layer':<{width}} " + "".join(f"{layer:>4}" for layer in part))
            for kind, row in kinds.items():
                cells = "".join(
                    _cell(row[layer], largest) if layer in row else " " * 4 for layer in part
                )
                lines.append(f"  {visible(kind):<{width}} {cells}")
    last = len(TERMINAL) - 1
    steps = sorted({-(-largest * step // last) for step in range(last + 1)})  # the first of each
    lines.append(f"scale of ranks {''.join(_cell(step, largest) for step in steps)}")
    return "\n".join(lines)


def save_png(
    ranks: Mapping[str, int], largest: int, path: Path, title: str, force: bool = False
) -> None:
    """The heatmap as a PNG, one panel per stack (needs matplotlib). Raises `OutputError` as
    `write_file`."""
    from matplotlib.figure import Figure

    grid = rank_grid(ranks)
    rows = sum(len(kinds) for kinds in grid.values())
    columns = max(len({x for row in kinds.values() for x in row}) for kinds in grid.values())
    figure = Figure(
        figsize=(4 + 0.45 * columns, 1.2 + 0.36 * rows + 0.8 * len(grid)), layout="constrained"
    )
    panels = figure.subplots(
        len(grid), 1, squeeze=False, height_ratios=[len(kinds) for kinds in grid.values()]
    )
    for (panel,), (stack, kinds) in zip(panels, grid.items(), strict=True):
        layers = sorted({layer for row in kinds.values() for layer in row})
        cells = [[row.get(layer, float("nan")) for layer in layers] for row in kinds.values()]
        image = panel.imshow(cells, cmap=colours(), vmin=0, vmax=max(largest, 1), aspect="auto")
        panel.set_xticks(range(len(layers)) if stack else [], [*map(str, layers)] if stack else [])
        panel.set_yticks(range(len(kinds)), [drawn(kind) for kind in kinds])
        panel.set_title(drawn(stack) or "outside of layers", fontsize=9)
        if stack:
            panel.set_xlabel("layer")
        for y, row in enumerate(kinds.values()):
            for x, layer in enumerate(layers):
                if layer in row:
                    _number(panel, x, y, row[layer], largest)
    figure.colorbar(image, ax=panels, label="rank", aspect=30)
    _save(figure, path, title, force)


def _number(panel: Axes, x: int, y: int, rank: int, largest: int) -> None:
    """The rank in its cell, which is hatched where nothing is left."""
    color = "white" if 1.2 * rank > largest else "black"
    panel.text(x, y, str(rank), ha="center", va="center", fontsize=8, color=color)
    if not rank:
        from matplotlib.patches import Rectangle

        cell = Rectangle((x - 0.5, y - 0.5), 1, 1, hatch="////", linewidth=0)
        cell.set(facecolor="white", edgecolor="#d5dcdd")
        panel.add_patch(cell)


def save_curve(points: Sequence[CurvePoint], path: Path, title: str, force: bool = False) -> None:
    """Size against error as a PNG (needs matplotlib). Raises `OutputError` as `write_file`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    panel.plot(
        [p.parameters for p in points], [100 * p.error for p in points], marker="o", color=FULL
    )
    panel.set_xlabel("parameters of the adapter")
    panel.set_ylabel("relative error of the update, %")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    _save(figure, path, title, force)


def _save(figure: Figure, path: Path, title: str, force: bool) -> None:
    figure.suptitle(drawn(title), fontsize=11)
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    write_file(path, data.getvalue(), force)
