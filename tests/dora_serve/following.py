"""What is followed of a folder as it is now."""

from __future__ import annotations

from pathlib import Path

from converters.model.base import open_base
from dora_serve.vllm.desired import Desired, Following


def desired(root: Path, base: str | Path | None = None) -> Desired:
    return Following(root, given=None if base is None else open_base(base)).at_rest()


def find_run(root: Path, name: str) -> Path | None:
    """The folder of the run that a request for `name` means; None where there is none."""
    following = Following(root)
    return following._paths[name] if following.find(name) else None
