"""What a client may read of an error that names places of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from converters.errors import visible

_BEGIN = r"""(?<![^\s'"`(\[{<=,;:])"""  # not within an address, a hub id or a path
_WHOLE = re.compile(r"""(?m)(^  file: |['"`])/[^'"`\n]*/([^'"`\n/]*)(?=$|['"`])""")  # with blanks
_PATH = re.compile(_BEGIN + r"""/(?:[^\s/'"`]+/)*([^\s/'"`]+)""")


def told(text: str, root: Path | None = None) -> str:
    """`text` with what lies in the served folder `root` named from there on, and all that lies
    elsewhere by its last name alone."""
    if root is not None:
        top = _BEGIN + re.escape(visible(root).rstrip("/"))
        text = re.sub(f"{top}/", "", text)
        text = re.sub(rf"{top}(?![^\s'\"`,;:)])", lambda _: visible(root.name), text)
    return _PATH.sub(r"\1", _WHOLE.sub(r"\1\2", text))
