"""Encoder-decoders in ONNX Runtime: greedy and beam search with caches; those of text (BART, T5).

>>> from dora_serve.onnxruntime import Search, Seq2Seq
>>> model = Seq2Seq("onnx/")
>>> for done in model.generate(["a long text"], Search(max_tokens=60, beams=4), ["news"]):
...     print(done.text)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.json_files import read_json
from converters.files.onnx_files import ADAPTER_INDEX, DECODER, ENCODER, WITH_PAST

from .adapter_set import AdaptedFolder, Adapters, AdapterSet
from .beams import Beams, Search, allowed
from .decoder import Completion
from .limits import check_rows, lone
from .sampling import check_finite, log_softmax
from .search_config import read_search
from .session import EngineError, Prompt, Session, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_STEPS = 8  # tokens whose logits one run each gives


class EncoderDecoder(AdaptedFolder):
    """An encoder-decoder folder as `dora-export onnx` writes it, with its adapters, and the search
    for what it writes. `threads`: as `Session` takes it."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        super().__init__(folder)
        sessions = [Session(self.folder / n, threads) for n in (ENCODER, DECODER, WITH_PAST)]
        self._encoder, self._first, self._next = sessions
        config = read_json(self.folder / "config.json")
        own = self.folder / "generation_config.json"
        # Of rules only this file speaks where there is one: a BART's class has a forced end anyway.
        self.generation: dict[str, Any] = read_json(own) if own.exists() else config
        self.config: dict[str, Any] = {**config, **self.generation}
        self.adapter_set = AdapterSet(sessions)
        self.adapter_set.add_all(self.folder)

    @property
    def eos(self) -> frozenset[int]:
        found = self.config.get("eos_token_id")
        return frozenset(found if isinstance(found, list) else [] if found is None else [found])

    @property
    def start(self) -> int:
        """The decoder's first token."""
        found = self.config.get("decoder_start_token_id")
        if not isinstance(found, int):
            raise EngineError("the configuration names no decoder_start_token_id", file=self.folder)
        return found

    @property
    def forced(self) -> int | None:
        """What every answer begins with; None where the configuration does not say it."""
        found = self.generation.get("forced_bos_token_id")
        return found if isinstance(found, int) else None

    @property
    def forced_end(self) -> Any:
        """What a search ends an answer with that gets no more tokens; None for nothing."""
        return self.generation.get("forced_eos_token_id")

    def never(self, said: Sequence[int], new: int) -> list[int]:
        """The tokens that the configuration forbids behind the decoder's tokens `said`, whose last
        `new` ones answer, as transformers heeds them: an answer begins behind what is forced."""
        behind = int(self.forced is not None and len(said) - new == 1)
        begin = self.generation.get("begin_suppress_tokens") or [] if new == behind else []
        bad = [
            end
            for *word, end in self.generation.get("bad_words_ids") or []
            if (len(said) > len(word) and [*said[len(said) - len(word) :]] == word)
            and (word or end not in self.eos)
        ]
        return [*(self.generation.get("suppress_tokens") or []), *bad, *begin]

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token, of the prompt or of the answer."""
        caches = [v.shape for v in self._next.inference.get_inputs() if len(v.shape) == 4]
        return sum(4 * int(shape[1]) * int(shape[3]) for shape in caches) // 2

    def search(self, batch: Batch, search: Search, prompts: list[list[int]]) -> list[Completion]:
        """What follows the tokens that every row of `batch` begins with. `prompts`: what it was
        asked, for the answer."""
        eos = frozenset() if search.ignore_eos else self.eos
        steps = self.steps(batch, search, eos)
        while (found := next(steps)) is None:
            pass
        done = [Completion(row) for row in prompts]
        for completion, tokens in zip(done, found, strict=True):
            if tokens and tokens[-1] in eos:
                completion.reason, tokens = "stop", tokens[:-1]
            completion.tokens = tokens
            completion.text = self._text(tokens)
        return done

    def steps(
        self, batch: Batch, search: Search, eos: frozenset[int]
    ) -> Iterator[list[list[int]] | None]:
        """Take a step each time: None, and in the end what was found for every row, a token of
        `eos` at its end where one ended it."""
        find = self._greedy if search.beams == 1 else self._beams
        return find(batch, search, eos)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens))

    def _scores(
        self, batch: Batch, logits: Array, written: Sequence[Sequence[int]], search: Search
    ) -> Array:
        """Log-probabilities `[rows, vocab]`, what may not come next at -inf."""
        forced, begun = None, batch.first.shape[1]
        if len(written[0]) == 0 and begun == 1:  # who is told more than where to begin is not
            forced = self.forced
        elif len(written[0]) == search.max_tokens - 1 and not search.ignore_eos:
            forced = self.forced_end
        check_finite(logits)
        scores = log_softmax(logits)
        said = [[*first, *own] for first, own in zip(batch.first.tolist(), written, strict=True)]
        for row, tokens in zip(scores, said, strict=True):
            row[self.never(tokens, len(written[0]))] = -np.inf
        scores = allowed(scores, said, search, self.eos, forced, begun, batch.read)
        return log_softmax(scores) if self.generation.get("renormalize_logits") else scores

    def _greedy(
        self, batch: Batch, search: Search, eos: frozenset[int]
    ) -> Iterator[list[list[int]] | None]:
        written: list[list[int]] = [[] for _ in range(batch.rows)]
        logits = batch.start()
        while True:
            tokens = self._scores(batch, logits, written, search).argmax(axis=-1)
            for row, token in zip(written, tokens, strict=True):
                row.append(int(token))  # after its end a row goes on, and is cut below
            ended = all(eos & set(row) for row in written)
            if ended or len(written[0]) == search.max_tokens:
                yield [_until(row, eos) for row in written]
                return
            yield None
            logits = batch.step(tokens)

    def _beams(
        self, batch: Batch, search: Search, eos: frozenset[int]
    ) -> Iterator[list[list[int]] | None]:
        width = search.beams
        rows = [Beams(search, eos) for _ in range(batch.rows)]
        logits = np.repeat(batch.start(), width, axis=0)
        batch.widen(width)
        while True:
            running = [sequence for row in rows for sequence in row.running]
            scores = self._scores(batch, logits, running, search)
            parents: list[int] = []
            tokens: list[int] = []
            for i, row in enumerate(rows):
                own = slice(i * width, (i + 1) * width)
                came_from = row.advance(scores[own])
                parents.extend(i * width + beam for beam in came_from)
                tokens.extend(sequence[-1] for sequence in row.running)
            if all(row.done for row in rows):
                yield [row.best() for row in rows]
                return
            yield None
            batch.reorder(np.array(parents))
            logits = batch.step(np.array(tokens, np.int64))


def _until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to and with the first end."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


class Batch:
    """Rows that are decoded together, with their caches.

    `given`: what the encoder takes, of every row; `mask` `[rows, source]`: what of it counts, None
    where all does. `first` `[rows, n]`: the tokens that the decoder begins with. `read`: the tokens
    of every row that the encoder takes, none of speech.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        given: dict[str, Any],
        first: NDArray[np.int64],
        mask: NDArray[np.int64] | None = None,
        adapters: Adapters = None,
        read: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._model, self.first, self.rows = model, first, len(first)
        self.read: list[Sequence[int]] = [*(read or [()] * self.rows)]
        self._adapters = model.adapter_set.feeds(model.adapter_set.per_row(adapters, self.rows))
        self._mask = {} if mask is None else {"encoder_attention_mask": mask}
        large = lone(self.read, model.config)
        states = model._encoder.run({**given, **self._adapters}, gives_back=large)
        (self._states,) = states.values()
        self._past: dict[str, Any] = {}

    def _decode(self, session: Session, feeds: dict[str, Any]) -> Array:
        """The logits; the caches are kept for the next run."""
        more = {**self._mask, **self._past, **self._adapters}
        outputs = session.run({**feeds, **more})
        logits: Array = outputs.pop("logits")
        for name, cache in outputs.items():
            self._past[name.replace("present", "past_key_values", 1)] = cache
        return logits

    def start(self) -> Array:
        """Run the decoder's first tokens; the logits `[rows, vocab]` after them."""
        return self.begin(self.first)[:, -1]

    def begin(self, tokens: NDArray[np.int64]) -> Array:
        """Run `tokens` `[rows, n]` as the decoder's first; the logits after each of them."""
        feeds = {"input_ids": tokens, "encoder_hidden_states": self._states}
        return self._decode(self._model._first, feeds)

    def written(self, tokens: NDArray[np.int64]) -> Array:
        """Run `tokens` `[rows, n]` as they come to be written: the first half at once, and those
        behind it, at most `_STEPS`, one after another; the logits after each of them."""
        length = tokens.shape[1]
        begun = max((length + 1) // 2, length - _STEPS)
        found = [self.begin(tokens[:, :begun])]
        found += [self.step(column)[:, None] for column in tokens[:, begun:].T]
        return np.concatenate(found, axis=1)

    def step(self, tokens: NDArray[np.int64]) -> Array:
        """Add one token to every row; the logits `[rows, vocab]` after it."""
        return self._decode(self._model._next, {"input_ids": tokens[:, None]})[:, -1]

    def widen(self, width: int) -> None:
        """Have every row `width` times, side by side."""
        self.first = np.repeat(self.first, width, axis=0)
        self.read = [row for row in self.read for _ in range(width)]
        self._mask = {name: np.repeat(m, width, axis=0) for name, m in self._mask.items()}
        if ADAPTER_INDEX in self._adapters:
            index = np.repeat(self._adapters[ADAPTER_INDEX], width)
            self._adapters = {**self._adapters, ADAPTER_INDEX: index}
        self._past = {name: np.repeat(c, width, axis=0) for name, c in self._past.items()}

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows alone."""
        self.first, self.rows = self.first[rows], len(rows)
        self.read = [self.read[row] for row in rows]
        self._mask = {name: mask[rows] for name, mask in self._mask.items()}
        if ADAPTER_INDEX in self._adapters:
            index = self._adapters[ADAPTER_INDEX][rows]
            self._adapters = {**self._adapters, ADAPTER_INDEX: index}
        self._past = {name: cache[rows] for name, cache in self._past.items()}

    def reorder(self, parents: NDArray[np.int64]) -> None:
        """Let every row go on from the decoder's caches of another row with the same prompt."""
        for name in self._past:
            if ".decoder." in name:
                self._past[name] = self._past[name][parents]


class Seq2Seq(EncoderDecoder):
    """A folder of a model that reads text and writes text; raises `EngineError` for another."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        super().__init__(folder, threads)
        if "input_ids" not in self._encoder.types:
            raise EngineError(
                "the graph is for another task", file=self.folder, expected="a model of text"
            )

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        adapters: Adapters = None,
    ) -> Array:
        """The logits `[rows, tokens, vocab]` after every decoder token, `targets` of one length;
        of both graphs of the decoder, as when they are written."""
        first = np.array(targets, np.int64)
        return self.batch(rows, adapters, first).written(first)

    def generate(
        self,
        prompts: Sequence[Prompt],
        search: Search | None = None,
        adapters: Adapters = None,
    ) -> list[Completion]:
        """What the model writes for every prompt with its adapter (one name for all, or one per
        prompt), by default as `usual` has it.

        Raises `EngineError` for an unknown adapter, an empty prompt, or one that is too long.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        return self.search(self.batch(rows, adapters), search or self.usual, rows)

    @property
    def usual(self) -> Search:
        """As the generation configuration has a text written. Raises `EngineError` where it asks
        for what is not done here."""
        return read_search(self.generation, self.folder, self.max_length)

    @property
    def max_length(self) -> int:
        """How many tokens a prompt or an answer may have; of a model without positions of its own
        2,048, since what it takes to read grows with the square."""
        return int(self.config.get("max_position_embeddings") or 2048)

    def batch(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Adapters = None,
        first: NDArray[np.int64] | None = None,
    ) -> Batch:
        """The rows that are read, each with its adapter, before anything is written. `first [rows,
        tokens]`: what is written begins with; the configuration says it where it is None. Raises
        `EngineError` for a row that is empty or too long."""
        # T5 has relative positions and no largest length.
        longest = self.config.get("max_position_embeddings")
        check_rows(rows, longest or max(map(len, rows), default=0))
        mask = padded([[1] * len(row) for row in rows], 0)
        ids = padded(rows, self.config.get("pad_token_id") or 0)
        if first is None:
            first = np.full((len(rows), 1), self.start, np.int64)
        return Batch(self, {"input_ids": ids, "attention_mask": mask}, first, mask, adapters, rows)
