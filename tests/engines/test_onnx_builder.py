"""What becomes of a graph, or what stands beside it, that could not be written to the end."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from converters.errors import OutputError
from converters.files.onnx_files import MODEL
from converters.targets.onnx import adapters, decoder
from dora_serve import write_onnx
from dora_serve.folder.templates import chat_templates
from tests.conftest import MODELS

BASE = MODELS / "tiny-llama-base"


def ending(monkeypatch: pytest.MonkeyPatch, folder: Path, last: str) -> None:
    """Let the builder be a shell that does `last`."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{last}\n")
    python.chmod(0o755)
    monkeypatch.setattr(decoder, "sys", SimpleNamespace(executable=str(python)))


def build(folder: Path) -> bool:
    (folder / "built").mkdir()
    return decoder._build(BASE, folder / "built", "fp32", False)


def test_a_model_that_it_refuses_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, tmp_path, "echo 'NotImplementedError: no such model' >&2; exit 1")
    assert not build(tmp_path)


@pytest.mark.parametrize(
    "last",
    ["kill -9 $$", "kill -7 $$", "exit 137", "exit 70"]
    + [
        f"echo '{said}' >&2; exit 1"
        for said in (
            "OSError: [Errno 28] No space left on device",
            "SafetensorError: I/O error: No space left on device (os error 28)",
            "MemoryError",
            "RuntimeError: DefaultCPUAllocator: can'\\''t allocate memory",
            "RuntimeError: std::bad_alloc",
        )
    ],
)
def test_a_reason_that_passes_makes_no_other_graph(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, tmp_path, last)
    with pytest.raises(OutputError, match="broke off"):
        build(tmp_path)


@pytest.mark.further
def test_the_builder_itself_without_room_for_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "sys", sys)  # a process below this one, which has its limits
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match="broke off"):
            build(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert decoder._build(BASE, tmp_path / "built", "fp32", False)
    assert (tmp_path / "built" / MODEL).exists()


def test_a_base_with_several_chat_templates(tmp_path: Path) -> None:
    """The builder writes a folder of them, where there is one already."""
    base = shutil.copytree(BASE, tmp_path / "base")
    tools = base / "additional_chat_templates" / "tool_use.jinja"
    tools.parent.mkdir()
    tools.write_text("tools")
    (base / "chat_template.jinja").write_text("none")
    write_onnx(base, tmp_path / "graph", precision="fp32")
    assert chat_templates(tmp_path / "graph") == {"default": "none", "tool_use": "tools"}


@pytest.mark.parametrize("count", [10, 100_000])  # within its buffer, and beyond
def test_an_adapter_without_room(count: int) -> None:
    """ONNX Runtime tells no number of an error, and the command ended in a traceback."""
    with pytest.raises(OutputError, match="could not write the adapter"):
        adapters.write_own_heads(Path("/dev/full"), {"weight": np.ones(count, dtype=np.float32)})
