"""ONNX Runtime sessions on the CPU, and the tokenizer beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.errors import DoraExportError, MissingError
from converters.files.handles import check_file
from converters.files.json_files import read_json
from converters.files.onnx_files import BATCHED, DATA, MODEL

from .huge_pages import gather

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGE = 1 << 26  # bytes of a graph and its weights, of which a step finds not all at once
_SPIN = 100  # microseconds
_LONGEST = 1 << 14  # signs of a token's text
_SHRINKS = ("memory.enable_memory_arena_shrinkage", "cpu:0")
PIPELINES = "sentence_*_config.json"  # of sentence-transformers, one for each kind of model

Prompt = str | Sequence[int]


class EngineError(DoraExportError, ValueError):
    """The engine cannot do what was asked of it."""


class Session:
    """ONNX Runtime's session of the graph at `path`. `types` of the inputs it needs and `defaults`,
    the shapes of those it can do without, such as an adapter's; both and `outputs` by name.

    `threads` None is one per core. What they wait for in a run mostly comes within microseconds:
    they keep their core so long, but not from the HTTP side and other engines between runs.

    Raises `MissingError` when there is no graph, `EngineError` when it cannot be loaded.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        self.path = path
        if not path.exists():
            raise MissingError("no ONNX graph here", file=path, remedy="make it: dora-export onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN))
        try:
            providers = ["CPUExecutionProvider"]
            self.inference: Any = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:
            raise EngineError(
                "ONNX Runtime cannot load this graph",
                file=path,
                found=str(error)[:300],
                remedy="export it again",
            ) from None
        files = [file for file in (path, path.with_name(DATA)) if file.exists()]
        if sum(file.stat().st_size for file in files) >= _LARGE:
            gather()
        self.types: dict[str, str] = {v.name: v.type for v in self.inference.get_inputs()}
        # An input with a default counts as an initializer.
        defaults = self.inference.get_overridable_initializers()
        self.defaults: dict[str, list[int | str]] = {v.name: list(v.shape) for v in defaults}
        self.outputs: list[str] = [value.name for value in self.inference.get_outputs()]

    def taken(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `feeds` that are inputs of this graph."""
        return {n: array for n, array in feeds.items() if n in self.types or n in self.defaults}

    def run(self, feeds: Mapping[str, Any], *, gives_back: bool = False) -> dict[str, Any]:
        """The outputs by name. `gives_back`: what the run takes of memory is not kept for the next
        one, which takes longer then. Raises `EngineError` when the graph cannot be run with
        `feeds`."""
        options = None
        if gives_back:
            import onnxruntime

            options = onnxruntime.RunOptions()
            options.add_run_config_entry(*_SHRINKS)
        try:
            found = self.inference.run(self.outputs, self.taken(feeds), options)
        except Exception as error:
            raise EngineError(
                "ONNX Runtime cannot run these rows", file=self.path, found=str(error)[:300]
            ) from None
        return dict(zip(self.outputs, found, strict=True))


def open_adaptable(folder: Path, threads: int | None = None) -> Session:
    """The graph of `folder` that takes another adapter in every row, else the one there is."""
    batched = folder / BATCHED
    return Session(batched if batched.exists() else folder / MODEL, threads)


def padded(rows: Sequence[Sequence[int]], value: int) -> NDArray[np.int64]:
    """The rows `[rows, longest]`, filled with `value` behind their ends."""
    filled = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return filled


class OnnxFolder:
    """A folder as `dora-export onnx` writes it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the folder, in lower case where its sentence-transformers pipeline reads texts so.
        Without one, token ids can be given, and every text is empty."""
        from tokenizers import Tokenizer
        from tokenizers.normalizers import Lowercase, Sequence

        path = self.folder / "tokenizer.json"
        if not path.exists():
            return _NoTokenizer(path)
        try:
            check_file(path)
            tokenizer = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit, DoraExportError):
            raise
        except BaseException as error:  # a panic of the library too
            raise EngineError(
                "the tokenizer cannot be read", file=path, found=str(error)[:300]
            ) from None
        _check_decoder(path, tokenizer)
        # Some files say how to fill or cut texts, which is for whoever makes a batch of them.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Where a text that looks like a special token is a text: tokenizer.json does not say so.
        tokenizer.encode_special_tokens = self._configured.get("split_special_tokens") is True
        if any(read_json(each).get("do_lower_case") for each in self.folder.glob(PIPELINES)):
            own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
            tokenizer.normalizer = Sequence([Lowercase(), *own])
        return tokenizer

    @cached_property
    def _configured(self) -> Any:
        path = self.folder / "tokenizer_config.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the tokens that the tokenizer's files name, such as `eos_token`: as
        transformers reads them, by its configuration where that tells the tokens themselves too,
        else by the map beside it first."""
        path = self.folder / "special_tokens_map.json"
        named = [read_json(path) if path.exists() else {}, self._configured]
        found: dict[str, str] = {}
        for said in named if "added_tokens_decoder" in named[1] else reversed(named):
            for name, given in said.items():
                text = given.get("content") if isinstance(given, Mapping) else given
                if name.endswith("_token") and isinstance(text, str):
                    found[name] = text
        return found

    @property
    def end(self) -> int | None:
        """The token that the tokenizer's files call the end of a text; None where none does."""
        text = self.special_tokens.get("eos_token")
        found: int | None = None if text is None else self.tokenizer.token_to_id(text)
        return found

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, special tokens included; ids stay as they are."""
        return list(self.tokenizer.encode(prompt).ids) if isinstance(prompt, str) else list(prompt)


def _check_decoder(path: Path, tokenizer: Any) -> None:
    """Raise `EngineError` where a token's text, which is computed beside all others', could take
    long or become long: a pattern may never end, and replacements multiply."""
    said = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    grows, left = 1.0, [said or {}]
    while left:
        each = left.pop()
        left += each.get("decoders", [])
        if each.get("type") == "Replace":
            size = len(each["pattern"].get("String", ""))  # there is none where it has a pattern
            grows *= max(1.0, len(each["content"]) / size) if size else inf
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if grows * longest > _LONGEST:
        raise EngineError(
            "the tokenizer's decoder is none that can be bounded",
            file=path,
            found=f"tokens of {longest} signs, replaced by up to {grows:g} times as many",
            expected=f"at most {_LONGEST} signs a token, and no patterns",
        )


class _NoTokenizer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def encode(self, *_: str, **__: bool) -> Any:
        raise MissingError("no tokenizer here", file=self._path, remedy="give token ids")

    def decode(self, _: object, **__: bool) -> str:
        return ""

    def token_to_id(self, _: str) -> None:
        return None

    def get_added_tokens_decoder(self) -> dict[int, object]:
        return {}
