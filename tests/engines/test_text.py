"""Text to tokens and back where a tokenizer has habits of its own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dora_serve.onnxruntime.generation import Detokenizer
from dora_serve.onnxruntime.sampling import Sampling, draw
from dora_serve.onnxruntime.session import EngineError, OnnxFolder


def llama_tokenizer() -> Tokenizer:
    """Words with a mark for the space, which the decoder takes from the beginning of a text."""
    words = ["<unk>", "▁count", "▁nine", "▁eight", "ness"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_a_completion_keeps_its_first_space() -> None:
    tokenizer = llama_tokenizer()
    prompt, answer = tokenizer.encode("count nine").ids, tokenizer.encode("eight").ids
    text = Detokenizer(tokenizer, prompt)
    told = "".join(text.add(token) for token in [*answer, 4]) + text.rest()
    assert "count nine" + told == tokenizer.decode([*prompt, *answer, 4]) == "count nine eightness"


def test_no_filling_and_no_cutting(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert OnnxFolder(tmp_path).tokenizer.encode("count nine eight").ids == [1, 2, 3]


def test_special_tokens_that_are_texts(tmp_path: Path) -> None:
    """Of `split_special_tokens` tokenizer.json says nothing, and transformers heeds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    for split in (False, True):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", split_special_tokens=split
        )
        fast.save_pretrained(tmp_path)
        right = AutoTokenizer.from_pretrained(tmp_path)("a</s>b")["input_ids"]
        assert len(right) == (6 if split else 3)
        assert OnnxFolder(tmp_path).encode("a</s>b") == right


@pytest.mark.parametrize(
    "means_harm",
    [
        [decoders.Replace(Regex("(x+x+)+y"), "")],
        [decoders.Replace("a", "aa")] * 40,
        [decoders.Fuse(), decoders.Replace("", "a")],
    ],
    ids=["a pattern", "growth", "nothing replaced"],
)
def test_a_decoder_without_bounds_is_refused(means_harm: list[object], tmp_path: Path) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.decoder = decoders.Sequence(means_harm)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(EngineError, match="decoder"):
        _ = OnnxFolder(tmp_path).tokenizer


def test_logits_that_are_no_numbers_give_no_token() -> None:
    generator = np.random.default_rng(0)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            draw(np.full(4, math.nan, np.float32), Sampling(temperature=temperature), generator)
    logits = np.array([0, 3, 1], np.float32)
    assert draw(logits, Sampling(temperature=1e-308), generator) == 1
