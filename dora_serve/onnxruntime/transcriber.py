"""Whisper in ONNX Runtime: speech in, text out; another adapter in every row of a batch.

>>> from dora_serve.onnxruntime import Transcriber
>>> model = Transcriber("onnx/")
>>> for done in model.transcribe([wave], language="en"):
...     print(done.text)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.json_files import read_json

from .adapter_set import Adapters
from .beams import Search
from .decoder import Completion
from .search_config import read_search
from .seq2seq import Batch, EncoderDecoder
from .session import EngineError
from .spectrum import Spectrum, read_spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

FEATURES = "input_features"
TASKS = ("transcribe", "translate")
_TIME = re.compile(r"<\|\d+\.\d+\|>")


def hears(folder: Path) -> bool:
    """Whether the encoder-decoder in `folder` takes speech."""
    return "num_mel_bins" in read_json(folder / "config.json")


class Transcriber(EncoderDecoder):
    """A folder of a Whisper as `dora-export onnx` writes it, with its adapters. Raises
    `EngineError` for one of a model that does not hear."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        super().__init__(folder, threads)
        if not hears(self.folder):
            raise EngineError(
                "the graph is for another task", file=self.folder, expected="a model of speech"
            )

    @cached_property
    def spectrum(self) -> Spectrum:
        """What makes features of a wave."""
        return read_spectrum(self.folder)

    @property
    def positions(self) -> int:
        """How many tokens the decoder may have, what it begins with included."""
        return int(self.config["max_target_positions"])

    @property
    def languages(self) -> dict[str, int]:
        """The languages' codes, and the tokens for them; none of a model of English alone."""
        known = self.config.get("lang_to_id") or {}
        return {name.strip("<|>"): int(token) for name, token in known.items()}

    @property
    def _spoken(self) -> str | None:
        """The code of the language that the configuration names, as that of a model tuned for
        one."""
        said = self.config.get("language")
        return said.lower().strip("<|>") if isinstance(said, str) else None

    def _forced(self, task: str) -> list[int | None]:
        """What an older configuration, which names neither language nor task, has follow the first
        token; None is the language that is heard. Of another task nothing."""
        said, asks = self.config.get("forced_decoder_ids"), self.config.get
        if not said or asks("language") or asks("task"):
            return []
        try:
            found = [token for _, token in sorted(said, key=lambda each: each[0])]
        except (TypeError, ValueError, IndexError):
            found = [-1]
        if not all(t is None or (isinstance(t, int) and 0 <= t < self.vocabulary) for t in found):
            raise EngineError(
                "the configuration's forced_decoder_ids are no tokens", file=self.folder, found=said
            )
        others = {t for name, t in (asks("task_to_id") or {}).items() if name != task}
        return [] if others & {*found} else found

    @cached_property
    def usual(self) -> Search:
        """How a text is written where nobody says it: as the configuration does. Raises
        `EngineError` where it asks for what is not done here."""
        return read_search(self.generation, self.folder, self.positions, heard=True)

    def logits(
        self, features: Array, targets: Sequence[Sequence[int]], adapters: Adapters = None
    ) -> Array:
        """The logits `[rows, tokens, vocab]` after every decoder token, of `features [rows, bands,
        frames]`, `targets` of one length; of both graphs of the decoder, as when they are
        written."""
        tokens = np.array(targets, np.int64)
        return Batch(self, {FEATURES: features}, tokens, adapters=adapters).written(tokens)

    def transcribe(
        self,
        waves: Sequence[Array],
        language: str | None = None,
        task: str = "transcribe",
        search: Search | None = None,
        adapters: Adapters = None,
        prompt: Sequence[int] = (),
    ) -> list[Completion]:
        """The text of every wave, samples `[n]` between -1 and 1 at `spectrum.rate`, without times.

        `language`: its code, for all; None is that of the configuration, and where it names none
        lets the model tell, for each. `prompt`: tokens of text that came before. Raises
        `EngineError` for an unknown language, task or adapter, and for a wave that is empty, not
        finite, or longer than the model hears at once.
        """
        features = np.stack([self._features(wave) for wave in waves])
        return self.write(features, language, task, search, adapters, prompt)

    def write(
        self,
        features: Array,
        language: str | None = None,
        task: str = "transcribe",
        search: Search | None = None,
        adapters: Adapters = None,
        prompt: Sequence[int] = (),
    ) -> list[Completion]:
        """The same of `features [rows, bands, frames]`, which transformers' feature extractor makes
        too."""
        first = self._first_tokens(features, language, task, adapters)
        if prompt:
            if marks := {*prompt} & {*self.tokenizer.get_added_tokens_decoder()}:
                raise EngineError(
                    "the text before has a word that is a mark to the model",
                    found=", ".join(str(self.tokenizer.id_to_token(mark)) for mark in marks),
                )
            begin = [self._said("prev_sot_token_id"), *prompt]
            first = np.concatenate([np.tile(begin, (len(first), 1)), first], axis=1)
        positions, room = self.positions, self.positions - first.shape[1]
        search = search or replace(self.usual, max_tokens=min(room, self.usual.max_tokens))
        if search.max_tokens > room:
            raise EngineError(
                "more tokens than the model has positions for",
                found=first.shape[1] + search.max_tokens,
                expected=f"at most {positions}, what it begins with included",
            )
        batch = Batch(self, {FEATURES: features}, first, adapters=adapters)
        return self.search(batch, search, first.tolist())

    def _text(self, tokens: Sequence[int]) -> str:
        # To the tokenizer times are words, which the model may write though it is asked for none.
        return _TIME.sub("", super()._text(tokens))

    def _features(self, wave: Array) -> Array:
        samples = np.asarray(wave)
        longest = self.spectrum.longest
        if samples.ndim != 1 or not 0 < len(samples) <= longest or not np.isfinite(samples).all():
            raise EngineError(
                "not a wave that the model hears",
                found=f"samples {list(samples.shape)}",
                expected=f"1 to {longest} finite ones",
            )
        return self.spectrum(samples)

    def _first_tokens(
        self, features: Array, language: str | None, task: str, adapters: Adapters
    ) -> NDArray[np.int64]:
        """The tokens `[rows, n]` that tell the decoder what is asked, as transformers has them."""
        first = np.full((len(features), 1), self.start, np.int64)
        forced = [] if language or self._spoken else self._forced(task)
        if languages := self.languages:
            language = self._spoken if language is None else language
            if forced and forced[0] in languages.values():
                spoken = np.full(len(features), forced[0])
            elif language is None:
                own = [*languages.values()]
                batch = Batch(self, {FEATURES: features}, first, adapters=adapters)
                spoken = np.array(own)[batch.start()[:, own].argmax(axis=-1)]
            elif language in languages:
                spoken = np.full(len(features), languages[language])
            else:
                raise EngineError("no such language", found=language, expected=[*languages])
            if task not in (known := self.config.get("task_to_id") or {}):
                raise EngineError("no such task", found=task, expected=", ".join(known))
            first = np.column_stack([first, spoken, np.full_like(spoken, known[task])])
        elif len(forced) > 1 and None not in forced and task == TASKS[0]:
            first = np.column_stack([first, np.tile(np.array(forced, np.int64), (len(first), 1))])
        elif language not in (None, "en") or task != TASKS[0]:
            raise EngineError(
                "this model writes English that it hears, and nothing else",
                file=self.folder,
                found=f"{language}, {task}",
            )
        without_times = self.config.get("no_timestamps_token_id")
        if without_times is None or first[0, -1] == without_times:
            return first
        return np.pad(first, ((0, 0), (0, 1)), constant_values=without_times)

    def _said(self, key: str) -> Any:
        if self.config.get(key) is None:
            raise EngineError(f"the configuration names no {key}", file=self.folder)
        return self.config[key]
