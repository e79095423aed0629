"""Encoders in ONNX Runtime: classify, answer, embed; another adapter in every row of a batch.

>>> from dora_serve.onnxruntime import Encoder
>>> encoder = Encoder("onnx/")
>>> for found in encoder.classify(["a good film", "a bad film"], adapters=["sentiment", None]):
...     print(found.label, found.scores)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.json_files import read_json
from converters.files.onnx_files import OWN_HEADS, read_adapter_file

from .adapter_set import AdaptedFolder, Adapters, AdapterSet
from .limits import check_rows, lone
from .pipeline import ACTIVATIONS, POOLING, Pipeline, normalized
from .sampling import log_softmax
from .session import PIPELINES, EngineError, open_adaptable, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Families whose positions begin behind the padding's id, so that a row is that much shorter.
_POSITIONS_AFTER_PADDING = frozenset(
    "camembert data2vec-text ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta "
    "xlm-roberta-xl xmod".split()
)
# Families that mix neighbouring tokens without a mask, so that what fills a row up changes it.
_READ_PADDING = frozenset("canine convbert fnet funnel mobilebert nystromformer yoso".split())
_OF_ALL = ("last", "mean")  # what XLM's and FlauBERT's heads may read, whatever fills a row up
# Classes of no family, whose tokenizers give no types where their files ask for none.
_UNTYPED = ("TokenizersBackend", "PreTrainedTokenizerFast")
_LIBRARY = "config_sentence_transformers.json"
_OF_PROBLEM = {"regression": "Identity", "multi_label_classification": "Sigmoid"}
STATES = "last_hidden_state"
Ids = Sequence[int]
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Classification:
    """`logits [labels]`; `scores` sum to 1 and are the logit itself for a regression."""

    index: int
    label: str
    scores: tuple[float, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """The likeliest part of the context, its characters `start` to `end`, its log-probability."""

    text: str
    start: int
    end: int
    logprob: float


class Encoder(AdaptedFolder):
    """An encoder folder as `dora-export onnx` writes it, with its adapters.

    `threads`: as `Session` takes it.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        super().__init__(folder)
        self._session = open_adaptable(self.folder, threads)
        self.config: Any = read_json(self.folder / "config.json")
        self.outputs = self._session.outputs
        own = self.folder / OWN_HEADS
        heads = read_adapter_file(own) if own.exists() else {}
        self.adapter_set = AdapterSet([self._session], heads)
        self.adapter_set.add_all(self.folder)

    @cached_property
    def positions(self) -> int:
        """How many tokens a row can have; a million where nothing tells a bound."""
        longest = int(self.config.get("max_position_embeddings") or 1_000_000)
        after_padding = self.config.get("model_type") in _POSITIONS_AFTER_PADDING
        return longest - (1 + self._padding if after_padding else 0)

    @cached_property
    def max_length(self) -> int:
        """How many tokens a text may have: as many as there are positions, or less where the
        tokenizer or the pipeline says so, as in vLLM."""
        said = [self.positions]
        for path in (self.folder / "tokenizer_config.json", *self.folder.glob(PIPELINES)):
            known = read_json(path) if path.exists() else {}
            values = (known.get(key) for key in ("model_max_length", "max_seq_length"))
            said += [int(n) for n in values if isinstance(n, int | float) and n > 0]
        return min(said)

    @cached_property
    def _typed(self) -> bool:
        """Whether the two texts of a pair are of two types, as transformers has it."""
        path = self.folder / "tokenizer_config.json"
        said: Any = read_json(path) if path.exists() else {}
        names = said.get("model_input_names")
        if isinstance(names, list):
            typed = "token_type_ids" in names
        else:
            typed = said.get("tokenizer_class") not in _UNTYPED
        return typed and self.config.get("type_vocab_size") != 1

    @property
    def _padding(self) -> int:
        return int(self.config.get("pad_token_id") or 0)

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    def run(
        self, rows: Sequence[Ids], adapters: Adapters = None, types: Sequence[Ids] | None = None
    ) -> list[dict[str, Array]]:
        """Each row's outputs by name, without padding and with the labels its adapter has.

        `types`: token type ids of the rows, zeros where the model takes some and none are given,
        or its tokenizer is not to give any.
        """
        check_rows(rows, self.positions)
        wanted = self.adapter_set.per_row(adapters, len(rows))
        if not types or not self._typed:
            types = [[0] * len(row) for row in rows]
        # Without a batched form, the rows of one adapter are a batch; where padding is read, those
        # of one length.
        batched = self.adapter_set.batched
        read = self.config.get("model_type") in _READ_PADDING
        read = read or self.config.get("summary_type") in _OF_ALL
        kinds = [
            (None if batched else name, len(row) if read else None)
            for name, row in zip(wanted, rows, strict=True)
        ]
        groups = [[i for i, each in enumerate(kinds) if each == k] for k in dict.fromkeys(kinds)]
        found: list[dict[str, Array]] = [{} for _ in rows]
        for group in groups:
            ids = [rows[i] for i in group]
            batch = self._session.run(
                {
                    "input_ids": padded(ids, self._padding),
                    "attention_mask": padded([[1] * len(row) for row in ids], 0),
                    "token_type_ids": padded([types[i] for i in group], 0),
                    **self.adapter_set.feeds([wanted[i] for i in group]),
                },
                gives_back=lone(ids, self.config),
            )
            for place, i in enumerate(group):
                arrays = {name: array[place] for name, array in batch.items()}
                found[i] = self._own(arrays, len(rows[i]), wanted[i])
        return found

    def _own(self, arrays: dict[str, Array], length: int, adapter: str | None) -> dict[str, Array]:
        """What of a row's outputs, padded with other rows, is its own."""
        outputs = {}
        for name, row in arrays.items():
            if name != "logits" or row.ndim == 2:  # per token
                row = row[:length]
            if name == "logits":
                row = row[..., : self.adapter_set.labels(adapter)]
            if not np.isfinite(row).all():
                raise EngineError(
                    "what was computed is not finite",
                    file=self.folder,
                    tensor=name,
                    found=adapter or "no adapter",
                    remedy="the run diverged, or its numbers are too large: use another",
                )
            outputs[name] = row
        return outputs

    def encoding(self, text: Text) -> Any:
        """Token ids, types and character offsets of a text or a pair, special tokens included."""
        return self.tokenizer.encode(*((text,) if isinstance(text, str) else text))

    def _run_texts(
        self, texts: Sequence[Text], adapters: Adapters
    ) -> tuple[list[Any], list[dict[str, Array]]]:
        encoded = [self.encoding(text) for text in texts]
        check_rows([each.ids for each in encoded], self.max_length)
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

    def classify(self, texts: Sequence[Text], adapters: Adapters = None) -> list[Classification]:
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

    @cached_property
    def _activation(self) -> str | None:
        """The name of what makes scores of logits: as sentence-transformers saved it beside a model
        of its own, else as vLLM's pooling has it, by the configuration's `problem_type` or its
        activation; None where nothing is said."""
        path = self.folder / _LIBRARY
        own = read_json(path).get("activation_fn") if path.exists() else None
        if own is None and (problem := self.config.get("problem_type")):
            return _OF_PROBLEM.get(str(problem))
        said = self.config.get("sentence_transformers") or {}
        older = said.get("activation_fn") or self.config.get("sbert_ce_default_activation_function")
        found = own or older
        return None if found is None else str(found)[:100].rpartition(".")[2]

    def probabilities(self, logits: Array) -> Array:
        """Those of `logits [..., labels]` by the model's activation, without one those of all
        labels together, or of the only one. Raises `EngineError` for an activation that is not
        known here."""
        name = self._activation
        if name is None and logits.shape[-1] > 1:
            return np.exp(log_softmax(logits))
        activation = ACTIVATIONS.get(name or "Sigmoid")
        if activation is None:
            raise EngineError(
                "the activation of this model is not known here",
                file=self.folder,
                found=name,
                expected=", ".join(ACTIVATIONS),
                remedy="ask for logits: use_activation false",
            )
        return activation(logits)

    def classification(self, logits: Array) -> Classification:
        """What `logits [labels]` say."""
        values = tuple(float(value) for value in logits)
        regression = len(values) == 1
        scores = values if regression else tuple(np.exp(log_softmax(logits)).tolist())
        index = int(np.argmax(logits))
        known = len(self.labels) == len(values)
        label = self.labels[index] if known else f"LABEL_{index}"
        return Classification(index, label, scores, values)

    @property
    def labels(self) -> list[str]:
        """The names of the configuration's classes."""
        names = self.config.get("id2label") or {}
        return [str(names.get(str(i), "")) for i in range(len(names))]

    def answer(
        self, questions: Sequence[tuple[str, str]], adapters: Adapters = None, longest: int = 30
    ) -> list[Span]:
        """The answer to every (question, context), at most `longest` tokens of the context."""
        self._needs("start_logits")
        encoded, outputs = self._run_texts(questions, adapters)
        found = []
        for (_, context), codes, each in zip(questions, encoded, outputs, strict=True):
            inside = [part == 1 for part in codes.sequence_ids]
            begin, end, logprob = likeliest_span(each, inside, longest)
            first, last = codes.offsets[begin][0], codes.offsets[end][1]
            found.append(Span(context[first:last], first, last, logprob))
        return found

    def embed(
        self, texts: Sequence[str], adapters: Adapters = None, pooling: str | None = None
    ) -> Array:
        """One vector per text, `[texts, n]`: what the folder's pipeline makes of its tokens, the
        mean where it has none; or with `pooling` one of `POOLING` alone."""
        self._needs(STATES)
        if pooling is not None and pooling not in POOLING:
            raise EngineError("no such pooling", found=pooling, expected=", ".join(POOLING))
        _, outputs = self._run_texts(texts, adapters)
        if pooling is not None:
            return np.stack([POOLING[pooling](each[STATES]) for each in outputs])
        vectors = [self.vector(each) for each in outputs]
        return np.stack([normalized(v) for v in vectors] if self.pipeline.normalized else vectors)

    @cached_property
    def pipeline(self) -> Pipeline:
        """What makes vectors of the states; raises `EngineError` where it is not known here."""
        self._needs(STATES)
        return Pipeline(self.folder)

    def vector(self, outputs: dict[str, Array]) -> Array:
        """The vector of one text of `run`, before its length is made one."""
        return self.pipeline(outputs[STATES])


def likeliest_span(
    outputs: dict[str, Array], inside: Sequence[bool], longest: int
) -> tuple[int, int, float]:
    """The first and the last token of an answer of at most `longest` tokens that are `inside` the
    context, and its log-probability. Raises `EngineError` where none is."""
    start, end = log_softmax(outputs["start_logits"]), log_softmax(outputs["end_logits"])
    places = np.flatnonzero(inside)
    if not len(places):
        raise EngineError("the context is empty")
    found = []
    for place, first in enumerate(places):
        ends = places[place : np.searchsorted(places, first + longest)]
        last = ends[end[ends].argmax()]
        found.append((int(first), int(last), float(start[first] + end[last])))
    return max(found, key=itemgetter(2))
