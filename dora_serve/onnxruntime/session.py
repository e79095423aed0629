"""ONNX Runtime sessions on the CPU, and the tokenizer beside them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from converters.errors import DoraExportError, MissingError
from converters.files.onnx_files import BATCHED, MODEL


class EngineError(DoraExportError, ValueError):
    """The engine cannot do what was asked of it."""


def open_graph(path: Path, threads: int | None = None, spin: bool = True) -> Any:
    """A session of the graph at `path`; `threads` None is one per core. `spin`: threads that have
    nothing to do keep their core for a while, which is faster where nobody else wants it.

    Raises `MissingError` when there is no graph, `EngineError` when it cannot be loaded.
    """
    import onnxruntime

    if not path.exists():
        raise MissingError("no ONNX graph here", file=path, remedy="make it: dora-export onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(
            "ONNX Runtime cannot load this graph",
            file=path,
            found=str(error)[:300],
            remedy="export it again",
        ) from None


def open_adaptable(folder: Path, threads: int | None = None, spin: bool = True) -> Any:
    """The graph of `folder` that takes another adapter in every row, else the one there is."""
    batched = folder / BATCHED
    return open_graph(batched if batched.exists() else folder / MODEL, threads, spin)


class OnnxFolder:
    """A folder as `dora-export onnx` writes it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the folder. Without one, token ids can be given, and every text is empty."""
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.exists():
            return _NoTokenizer(path)
        tokenizer = Tokenizer.from_file(str(path))
        # Some files say how to fill or cut texts, which is for whoever makes a batch of them.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


class _NoTokenizer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def encode(self, *_: str, **__: bool) -> Any:
        raise MissingError("no tokenizer here", file=self._path, remedy="give token ids")

    def decode(self, _: object, **__: bool) -> str:
        return ""
