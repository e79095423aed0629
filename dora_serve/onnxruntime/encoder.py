"""Encoders in ONNX Runtime: classify, answer, embed; another adapter in every row of a batch.

>>> from dora_serve.engines.onnx_encoder import Encoder
>>> encoder = Encoder("onnx/")
>>> for found in encoder.classify(["a good film", "a bad film"], adapters=["sentiment", None]):
...     print(found.label, found.scores)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.json_files import read_json
from converters.files.onnx_files import ADAPTER_INDEX, NO_ADAPTER, OWN_HEADS, read_adapter_file

from .adapter_set import AdapterSet
from .sampling import log_softmax
from .session import EngineError, OnnxFolder, open_adaptable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Families whose positions begin behind the padding's id, so that a row is that much shorter.
_POSITIONS_AFTER_PADDING = frozenset(
    "camembert data2vec-text ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta "
    "xlm-roberta-xl xmod".split()
)
Adapters = Sequence[str | None] | str | None
Ids = Sequence[int]


@dataclass(frozen=True)
class Classification:
    """`logits [labels]`; `scores` sum to 1 and are the logit itself for a regression."""

    index: int
    label: str
    scores: tuple[float, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """The likeliest part of the context, its characters `start` to `end`, its log-probability."""

    text: str
    start: int
    end: int
    logprob: float


class Encoder(OnnxFolder):
    """An encoder folder as `dora-export onnx` writes it, with its adapters.

    `threads` and `spin`: as `open_graph` takes them.
    """

    def __init__(self, folder: str | Path, threads: int | None = None, spin: bool = True) -> None:
        super().__init__(folder)
        self._session = open_adaptable(self.folder, threads, spin)
        self._config: Any = read_json(self.folder / "config.json")
        self._takes = {value.name for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        own = self.folder / OWN_HEADS
        self._set = AdapterSet(self._session, read_adapter_file(own) if own.exists() else {})
        self._set.add_all(self.folder)

    @property
    def max_length(self) -> int:
        """How many tokens a row may have; a million for a model that tells no bound."""
        longest = int(self._config.get("max_position_embeddings") or 1_000_000)
        after_padding = self._config.get("model_type") in _POSITIONS_AFTER_PADDING
        return longest - (1 + (self._config.get("pad_token_id") or 0) if after_padding else 0)

    @property
    def vocabulary(self) -> int:
        return int(self._config["vocab_size"])

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._set.names

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an `.onnx_adapter` file under `name`, in place of an earlier one of that name."""
        self._set.add(name, Path(path))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; the graph and the session stay as they are."""
        self._set.remove(name)

    def run(
        self, rows: Sequence[Ids], adapters: Adapters = None, types: Sequence[Ids] | None = None
    ) -> list[dict[str, Array]]:
        """Each row's outputs by name, without padding and with the labels its adapter has.

        `types`: token type ids of the rows, zeros where the model takes some and none are given.
        """
        one = isinstance(adapters, str) or adapters is None
        wanted: list[str | None] = [adapters] * len(rows) if one else list(adapters)  # type: ignore
        self._check(rows, wanted)
        found: list[dict[str, Array]] = [{} for _ in rows]
        # Without a batched form, the rows of one adapter are a batch.
        groups = [list(range(len(rows)))]
        if not self._set.batched:
            names = dict.fromkeys(wanted)
            groups = [[i for i, name in enumerate(wanted) if name == each] for each in names]
        for group in groups:
            names_here = [wanted[i] for i in group]
            feeds = self._feeds([rows[i] for i in group], names_here)
            if "token_type_ids" in self._takes:
                given = [types[i] if types is not None else [0] * len(rows[i]) for i in group]
                feeds["token_type_ids"] = _padded(given, 0)
            for i, outputs in zip(group, self._split(feeds, rows, group, wanted), strict=True):
                found[i] = outputs
        return found

    def _check(self, rows: Sequence[Ids], wanted: Sequence[str | None]) -> None:
        if len(wanted) != len(rows) or not rows:
            raise EngineError(
                "one adapter (or None) per row", found=len(wanted), expected=len(rows) or "1 row"
            )
        self._set.check(wanted)
        lengths = sorted(len(row) for row in rows)
        if not lengths[0] or lengths[-1] > self.max_length:
            raise EngineError(
                "a row is empty or too long",
                found=f"{lengths[0]} to {lengths[-1]} tokens",
                expected=f"1 to {self.max_length}",
            )

    def _feeds(self, rows: Sequence[Ids], wanted: Sequence[str | None]) -> dict[str, Any]:
        pad = self._config.get("pad_token_id") or 0
        mask = _padded([[1] * len(row) for row in rows], 0)
        feeds: dict[str, Any] = {"input_ids": _padded(rows, pad), "attention_mask": mask}
        if not self._set.batched:
            return {**feeds, **self._set.single(wanted[0])}
        used = tuple(dict.fromkeys(name for name in wanted if name is not None))
        index = [NO_ADAPTER if name is None else used.index(name) for name in wanted]
        feeds[ADAPTER_INDEX] = np.array(index, np.int64)
        return {**feeds, **self._set.stacked(used)}

    def _split(
        self,
        feeds: dict[str, Any],
        rows: Sequence[Ids],
        group: Sequence[int],
        wanted: Sequence[str | None],
    ) -> list[dict[str, Array]]:
        try:
            arrays = self._session.run(self.outputs, feeds)
        except Exception as error:
            raise EngineError(
                "ONNX Runtime cannot run these rows", file=self.folder, found=str(error)[:300]
            ) from None
        longest = feeds["input_ids"].shape[1]
        found = []
        for place, i in enumerate(group):
            outputs = {}
            for name, array in zip(self.outputs, arrays, strict=True):
                row = array[place]
                if name != "logits" or row.ndim == 2:  # per token
                    assert row.shape[0] == longest
                    row = row[: len(rows[i])]
                if name == "logits":
                    row = row[..., : self._set.labels(wanted[i])]
                if not np.isfinite(row).all():
                    raise EngineError(
                        "what was computed is not finite",
                        file=self.folder,
                        tensor=name,
                        found=wanted[i] or "no adapter",
                        remedy="the run diverged, or its numbers are too large: use another",
                    )
                outputs[name] = row
            found.append(outputs)
        return found

    def encode(self, text: str | tuple[str, str]) -> Any:
        """Token ids, types and character offsets of a text or a pair, special tokens included."""
        return (
            self.tokenizer.encode(text) if isinstance(text, str) else self.tokenizer.encode(*text)
        )

    def _run_texts(
        self, texts: Sequence[str | tuple[str, str]], adapters: Adapters
    ) -> tuple[list[Any], list[dict[str, Array]]]:
        encoded = [self.encode(text) for text in texts]
        types = [each.type_ids for each in encoded]
        return encoded, self.run([each.ids for each in encoded], adapters, types)

    def _needs(self, output: str) -> None:
        if output not in self.outputs:
            raise EngineError(
                "the graph is for another task",
                file=self.folder,
                found=f"outputs {', '.join(self.outputs)}",
                expected=output,
            )

    def classify(
        self, texts: Sequence[str | tuple[str, str]], adapters: Adapters = None
    ) -> list[Classification]:
        """The class of every text, or pair of texts."""
        self._needs("logits")
        _, outputs = self._run_texts(texts, adapters)
        return [self.classification(each["logits"]) for each in outputs]

    def classify_tokens(
        self, texts: Sequence[str], adapters: Adapters = None
    ) -> list[list[tuple[str, Classification]]]:
        """The tokens of every text, special ones left out, each with its class."""
        self._needs("logits")
        encoded, outputs = self._run_texts(texts, adapters)
        return [
            [
                (text[start:end], self.classification(row))
                for row, (start, end), special in zip(
                    each["logits"], codes.offsets, codes.special_tokens_mask, strict=True
                )
                if not special
            ]
            for text, codes, each in zip(texts, encoded, outputs, strict=True)
        ]

    def classification(self, logits: Array) -> Classification:
        """What `logits [labels]` say."""
        values = tuple(float(value) for value in logits)
        regression = len(values) == 1
        scores = values if regression else tuple(np.exp(log_softmax(logits)).tolist())
        index = int(np.argmax(logits))
        names = self._config.get("id2label") or {}
        known = len(names) == len(values)
        return Classification(
            index, names.get(str(index), "") if known else f"LABEL_{index}", scores, values
        )

    def answer(
        self, questions: Sequence[tuple[str, str]], adapters: Adapters = None, longest: int = 30
    ) -> list[Answer]:
        """The answer to every (question, context), at most `longest` tokens of the context."""
        self._needs("start_logits")
        encoded, outputs = self._run_texts(questions, adapters)
        found = []
        for (_, context), codes, each in zip(questions, encoded, outputs, strict=True):
            start, end = log_softmax(each["start_logits"]), log_softmax(each["end_logits"])
            inside = np.array([part == 1 for part in codes.sequence_ids])
            scores = start[:, None] + end[None, :]
            allowed = np.triu(np.outer(inside, inside)) & ~np.triu(
                np.ones_like(scores, bool), longest
            )
            if not allowed.any():
                raise EngineError("the context is empty", found=context[:80])
            best = np.unravel_index(np.where(allowed, scores, -np.inf).argmax(), scores.shape)
            first, last = codes.offsets[best[0]][0], codes.offsets[best[1]][1]
            found.append(Answer(context[first:last], first, last, float(scores[best])))
        return found

    def embed(
        self, texts: Sequence[str], adapters: Adapters = None, pooling: str = "mean"
    ) -> Array:
        """One vector per text, `[texts, hidden]`: the mean of its tokens, or with `pooling` "cls"
        its first."""
        self._needs("last_hidden_state")
        if pooling not in ("mean", "cls"):
            raise EngineError("no such pooling", found=pooling, expected="mean, cls")
        _, outputs = self._run_texts(texts, adapters)
        states = [each["last_hidden_state"] for each in outputs]
        return np.stack([s.mean(axis=0) if pooling == "mean" else s[0] for s in states])


def _padded(rows: Sequence[Ids], value: int) -> NDArray[np.int64]:
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
