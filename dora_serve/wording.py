"""What the library says, in the words of the command line."""

from __future__ import annotations

import re

VERBS = frozenset("adapter check diff export extract inspect lint merge onnx sign verify".split())


def in_flags(text: object) -> str:
    """`text` with the parameters between backticks as flags, and the verbs as commands."""
    return re.sub(r"`([a-z_]+)`", _word, str(text))


def _word(match: re.Match[str]) -> str:
    name = match[1]
    return f"dora-export {name}" if name in VERBS else "--" + name.replace("_", "-")
