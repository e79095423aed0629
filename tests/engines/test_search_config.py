"""What a generation configuration has an encoder-decoder do, and what it may not ask for; what it
does then is compared with transformers in tests/server/test_tasks.py and test_onnx_whisper.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

from dora_serve.onnxruntime.beams import Search, forbidden
from dora_serve.onnxruntime.search_config import read_search
from dora_serve.onnxruntime.seq2seq import EncoderDecoder
from dora_serve.onnxruntime.session import EngineError

FILE = Path("generation_config.json")
VOCABULARY = 5


def test_what_nothing_is_said_of() -> None:
    assert read_search({}, FILE, 100) == Search(100)
    assert read_search({}, FILE, 1000) == Search()
    assert read_search({}, FILE, 1000, heard=True) == Search(1000)


def test_lengths_count_the_token_that_an_answer_begins_behind() -> None:
    named = {"max_length": 20, "min_length": 5}
    assert read_search(named, FILE, 100) == Search(19, min_tokens=4)
    new = {"max_new_tokens": 7, "min_new_tokens": 3}
    assert read_search({**named, **new}, FILE, 100) == Search(7, min_tokens=3)
    assert read_search({"min_length": 0}, FILE, 9) == Search(9)


def test_what_is_said_of_draws_alone() -> None:
    """Holds where nothing is drawn, since it then says nothing."""
    assert read_search({"typical_p": 0.9, "epsilon_cutoff": 1e-4}, FILE, 9) == Search(9)


@pytest.mark.parametrize(
    "said",
    [
        {"num_beams": 65},
        {"num_beams": "4"},
        {"num_beams": 0},
        {"max_length": 1},
        {"min_length": -1},
        {"length_penalty": "long"},
        {"early_stopping": "soon"},
        {"encoder_no_repeat_ngram_size": 1.5},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 2, "repetition_penalty": 1.2},
        {"num_beam_groups": 2},
        {"penalty_alpha": 0.6},
        {"exponential_decay_length_penalty": [4, 1.1]},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "eta_cutoff": 3e-4},
    ],
)
def test_what_cannot_be_heeded(said: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        read_search(said, FILE, 100)
    assert [*said][-1] in str(caught.value) and str(FILE) in str(caught.value)


@pytest.mark.parametrize("name", ["min_length", "encoder_no_repeat_ngram_size", "do_sample"])
def test_what_is_not_heeded_of_speech(name: str) -> None:
    with pytest.raises(EngineError, match=name):
        read_search({name: 2}, FILE, 100, heard=True)
    read_search({name: 0}, FILE, 100, heard=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_may_not_follow_is_what_transformers_forbids(size: int) -> None:
    """Of five tokens, so that much comes twice; from one token on, when none can yet."""
    generator = np.random.default_rng(size)
    found = 0
    for length in range(1, 40):
        said = generator.integers(VOCABULARY, size=length).tolist()
        read = generator.integers(VOCABULARY, size=9).tolist()
        for search, process in (
            (Search(no_repeat_ngram=size), NoRepeatNGramLogitsProcessor(size)),
            (
                Search(no_read_ngram=size),
                EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor([read])),
            ),
        ):
            scores = process(torch.tensor([said]), torch.zeros(1, VOCABULARY))[0]
            own = {*forbidden(said, length, read, search, frozenset())}
            assert own == {*torch.isinf(scores).nonzero()[:, 0].tolist()}
            found += len(own)
    assert found > 10


def test_words_of_several_tokens_are_forbidden_as_transformers_forbids_them() -> None:
    model = EncoderDecoder.__new__(EncoderDecoder)
    words = [[1, 2], [0, 3, 4], [4], [3]]
    model.config = model.generation = {"bad_words_ids": words, "eos_token_id": 3}
    process = NoBadWordsLogitsProcessor(words, 3)
    generator = np.random.default_rng(0)
    several = 0
    for length in range(1, 60):
        said = generator.integers(VOCABULARY, size=length).tolist()
        scores = process(torch.tensor([said]), torch.zeros(1, VOCABULARY))[0]
        own = {*model.never(said, length)}
        assert own == {*torch.isinf(scores).nonzero()[:, 0].tolist()}
        several += len(own) > 1
    assert several > 5
