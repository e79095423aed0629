"""Files that cost little to send and much to take: full of holes, or of patterns."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from converters.errors import BaseError
from converters.readers import patterns
from dora_serve import merge


def test_holes_are_not_copied(llama_lora: Path, llama_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama_base, tmp_path / "base"))
    (base / "vocab.txt").touch()
    merge(llama_lora, tmp_path / "small", base=base)
    os.truncate(base / "vocab.txt", (1 << 30) + 1)
    with pytest.raises(BaseError, match="too large for a file that goes along"):
        merge(llama_lora, tmp_path / "large", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "small"]


def test_many_quick_patterns_take_no_longer_than_slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patterns.Patterns().suffix("a", "b.a")
    monkeypatch.setattr(patterns, "SECONDS_IN_ALL", 0.0)  # as when all of it is used
    with pytest.raises(patterns.PatternError, match="the patterns take longer"):
        patterns.Patterns().suffix("a", "b.a")
