"""The rank map as one HTML file that needs no other: what the server's page shows of a run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from converters.errors import visible

from .output import write_file

_PAGE = Path(__file__).parents[1] / "server" / "page"
_DRAW = """
const told = JSON.parse(document.getElementById("modules").textContent);
document.querySelector("main").append(rankMap(told));
"""


def save_html(
    modules: Mapping[str, Mapping[str, float | None]],
    facts: Mapping[str, str],
    path: Path,
    title: str,
    force: bool = False,
) -> None:
    """Write the map of `modules`, each with `start`, `rank`, `norm`, `relative` and `lost` (None
    for what is not known), below its `title` and `facts`. Raises `OutputError` as `write_file`."""
    style = "".join((_PAGE / name).read_text("utf-8") for name in ("base.css", "rankmap.css"))
    script = (_PAGE / "rankmap.js").read_text("utf-8") + _DRAW
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(visible(v))}</dd>" for k, v in facts.items())
    # In a script element only `<` could end the data.
    told = {visible(name): numbers for name, numbers in modules.items()}
    data = json.dumps(told).replace("<", "\\u003c")
    title = visible(title)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1></header>
<main>
<dl>{listed}</dl>
<noscript><p>The map needs JavaScript.</p></noscript>
</main>
<script type="application/json" id="modules">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""
    write_file(path, page.encode(), force)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
