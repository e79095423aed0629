"""What an artifact and the live model are both asked: text, or whatever else the model takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from converters.files.tensors import numel
from converters.model.architecture import offline
from converters.model.base import BaseModel
from converters.run import Run
from converters.targets.model import Inputs
from converters.targets.opening import class_of
from converters.updates.replaced import ReplacedRows

SENTENCES = (
    "The harbour was quiet, and only one boat had its lamp lit.",
    "def area(r):\n    return 3.14159 * r ** 2  # of a circle",
    "Город проснулся рано: трамваи, хлеб и первый снег.",
    "天气很好，我们一起去河边散步吧。ありがとう。",
    "تجري السفن بما لا تشتهي الرياح، 42 يوماً في البحر.",
)
ROWS, LENGTH = 4, 16  # of random ids
# Lengths at which a model of text begins to compute otherwise.
_LENGTHS = (
    *("sliding_window", "original_max_position_embeddings", "attention_chunk_size"),
    *("local_attention", "window_size", "attention_window"),
)
_OPERATIONS, _NBYTES = 2e12, 1 << 30  # the most that one long prompt may cost
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Prompts:
    """`batches` of a model's inputs. `asked`: what they are. `left`: what they are not, and why."""

    batches: list[Inputs]
    asked: tuple[str, ...]
    left: tuple[str, ...] = ()


def prompts_of(run: Run, base: BaseModel) -> Prompts:
    """The prompts for the model of `run`, which need not be loaded for it.

    Text in several scripts where the base has a tokenizer, random ids beside it, and a prompt
    longer than the lengths that the configuration names, as far as time and memory allow.
    """
    cls, config = class_of(run, base)
    vocab = _vocab(run, config)
    model = SimpleNamespace(config=config, main_input_name=cls.main_input_name)
    if cls.main_input_name != "input_ids":
        return Prompts([verification_batch(model)], (f"random {cls.main_input_name}",))
    text = config.get_text_config()
    limit = _longest(text)
    ids = verification_batch(model, length=min(LENGTH, limit), vocab=vocab)
    rows = [row[:limit] for row in _texts(base, vocab)]
    asked = [f"{len(rows)} texts"] if rows else []
    known = _trained_ids(run, vocab)
    if rows:
        ids = {name: value[:1] for name, value in ids.items()}
        ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    ids["input_ids"][0, : len(known)] = torch.tensor(known, dtype=torch.long)
    batches = [*_batches(config, rows, vocab), ids]
    asked.append(f"{len(ids['input_ids'])} x {ids['input_ids'].shape[1]} random ids")
    length, left = _crossing(config, cls.__name__, limit, vocab, base)
    if length:
        long = [token for row in rows for token in row] or ids["input_ids"].flatten().tolist()
        repeated = (long * (length // len(long) + 1))[:length]
        batches += _batches(config, [repeated], vocab)
        asked.append(f"one of {length} tokens")
    if any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        left.append("images and sound: only its text was asked")
    return Prompts(batches, tuple(asked), tuple(left))


def verification_batch(
    model: Any, rows: int = ROWS, length: int = LENGTH, seed: int = 0, vocab: int | None = None
) -> Inputs:
    """Random inputs from a fixed seed for `model`, by its `config` and `main_input_name`: token
    ids, the last row padded, decoder inputs for encoder-decoders; pixels, waves or spectra for
    models of images or sound."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name != "input_ids":
        shape = (rows, *_shape(model.main_input_name, config))
        inputs = {model.main_input_name: torch.randn(shape, generator=generator)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = _decoder_ids(config, rows, length, generator)
        return inputs
    text = config.get_text_config()
    vocab, pad = vocab or text.vocab_size, getattr(text, "pad_token_id", None)
    ids = torch.randint(min(5, vocab - 1), vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad is not None:
        mask[-1, length - length // 4 :] = 0
        ids[mask == 0] = pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _decoder_ids(config, rows, length, generator)
    return inputs


def _shape(kind: str, config: Any) -> tuple[int, ...]:
    """The shape of one input that is no text."""
    if kind == "pixel_values":
        size = getattr(config, "image_size", None) or config.vision_config.image_size
        channels = getattr(config, "num_channels", 3)
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        return (*frames, channels, *((size, size) if isinstance(size, int) else size))
    mels = getattr(config, "num_mel_bins", None)
    if kind == "input_features" and hasattr(config, "max_source_positions") and mels:
        return mels, 2 * config.max_source_positions  # Whisper's first layers halve it
    if mels:
        return getattr(config, "max_length", 1024), mels  # a spectrogram as an image
    if kind == "input_values":
        return (4000,)  # samples
    for width in ("input_feat_per_channel", "feature_projection_input_dim"):
        if hasattr(config, width):
            return 64, getattr(config, width)
    raise ValueError(f"which {kind} a {type(config).__name__} takes is not known")


def _decoder_ids(config: Any, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    vocab = config.get_text_config().vocab_size
    low = min(5, vocab - 1)
    return torch.randint(low, vocab, (rows, max(length // 2, 1)), generator=generator)


def _batches(config: Any, rows: list[list[int]], vocab: int) -> Iterator[Inputs]:
    """`rows` in one batch padded on the right, or each in its own where there is no padding."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    padded = pad is not None and 0 <= pad < vocab
    for group in [rows] if rows and padded else [[row] for row in rows]:
        longest = max(map(len, group))
        ids = [[*row, *[pad] * (longest - len(row))] for row in group]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in group]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if config.is_encoder_decoder:
            generator = torch.Generator().manual_seed(1)
            inputs["decoder_input_ids"] = _decoder_ids(config, len(group), LENGTH, generator)
        yield inputs


@offline()
def _texts(base: BaseModel, vocab: int) -> list[list[int]]:
    """The sentences in the base's tokens; none where it has no tokenizer that knows them."""
    from transformers import AutoTokenizer

    if not any((base.path / name).is_file() for name in _TOKENIZERS):
        return []
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
        rows = [list(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    except Exception:  # of whatever kind: ids need no tokenizer
        return []
    unknown = tokenizer.unk_token_id
    rows = [row for row in rows if sum(token == unknown for token in row) * 2 < len(row)]
    known = all(0 <= token < vocab for row in rows for token in row)
    return rows if known and len(rows) > 1 else []


def _vocab(run: Run, config: Any) -> int:
    """The rows of the input embedding, which the run may have resized."""
    size: int = getattr(config.get_text_config(), "vocab_size", 0)
    names = ("embed_tokens", "word_embeddings", "wte", "shared", "embeddings")
    own = [t for n, t in run.replaced.items() if n.removesuffix(".weight").endswith(names)]
    return next((t.shape[0] for t in own if len(t.shape) == 2), size)


def _trained_ids(run: Run, vocab: int) -> list[int]:
    """Some of the tokens whose embeddings the run trained alone, which no text would hit."""
    kinds = (run.updates[name] for name in run.embeddings if name in run.updates)
    rows = [update.index.tolist() for update in kinds if isinstance(update, ReplacedRows)]
    return [each for each in (rows[0] if rows else []) if each < vocab][: LENGTH // 2]


def _longest(text: Any) -> int:
    """How many tokens the model has positions for."""
    known = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return 1 << 20
    return max(known - 4, 1)  # RoBERTa's positions begin behind the padding's


def _crossing(
    config: Any, name: str, limit: int, vocab: int, base: BaseModel
) -> tuple[int, list[str]]:
    """The length of the long prompt, 0 for none, and which lengths it does not cross."""
    weights = sum(numel(tensor) for tensor in base.tensors.values())
    scores = vocab if name.endswith(("LM", "LMHeadModel", "Generation")) else 1
    dear = int(min(_OPERATIONS / (2 * max(weights, 1)), _NBYTES / (4 * scores)))
    found, left = 0, []
    for key, value in sorted(set(_lengths(config.get_text_config().to_dict()))):
        wanted = min(value + value // 8 + 8, limit)
        if wanted <= value:
            continue  # the model has no positions beyond it
        if wanted > dear:
            left.append(f"{key} {value} is not crossed: it would cost too much here")
        else:
            found = max(found, wanted)
    return (found if found > LENGTH else 0), left


def _lengths(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif key in _LENGTHS:
            for each in value if isinstance(value, list) else [value]:
                if type(each) is int and each > 0:
                    yield key, each
