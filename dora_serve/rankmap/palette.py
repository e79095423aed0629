"""The colours of every picture: from a rank of none to the largest, as the page's `--map-empty` and
`--map` (server/page/base.css) mixed in Oklab."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.colors import LinearSegmentedColormap

SCALE = (
    *("#e9eff0", "#cfdedf", "#b6cdcf", "#9dbcbe", "#84abae"),
    *("#6b9a9e", "#518a8e", "#357a7f", "#0e6a70"),
)
EMPTY, FULL = SCALE[0], SCALE[-1]
# The same in a terminal's 256 colours; on the last alone white is read better than black.
TERMINAL = (255, 253, 152, 109, 73, 66, 30, 23)


def colours() -> LinearSegmentedColormap:
    """The colours for matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ranks", SCALE)
