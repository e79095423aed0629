"""What an artifact and the live model are both asked: text, or whatever else the model takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from converters.errors import panics
from converters.files.tensors import LazyTensor, numel
from converters.model.architecture import offline
from converters.model.base import BaseModel
from converters.model.tying import input_embedding, new_embedding
from converters.run import Run
from converters.targets.model import Inputs
from converters.targets.opening import class_of
from converters.updates.update import Update

from .modalities import beside_text, places, random_input, takes, text_of, with_others

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
    *("local_attention", "window_size", "attention_window", "relative_attention_max_distance"),
)
_DECODER_LENGTHS = ("max_decoder_position_embeddings", "max_target_positions")
_OPERATIONS, _NBYTES = 2e12, 1 << 30  # the most that one long prompt may cost
_TOKENS = 4 * LENGTH  # of those that were trained alone, the most that are asked
TOKENIZERS = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm"),
)


@dataclass(frozen=True)
class Prompts:
    """`batches` of a model's inputs. `asked`: what they are. `left`: what they are not, and why.
    `less`: what is asked where the base cannot compute these."""

    batches: list[Inputs]
    asked: tuple[str, ...]
    left: tuple[str, ...] = ()
    less: Prompts | None = None


def prompts_of(run: Run, base: BaseModel, artifact: Path | None = None) -> Prompts:
    """The prompts for the model of `run`, which need not be loaded for it.

    Text where the base has a tokenizer, random ids beside it, the tokens that the run trained
    alone, and a prompt longer than the lengths that the configuration names, or that of `artifact`,
    as far as time and memory allow. Beside each, images or sound where the class takes them too.
    """
    cls, config = class_of(run, base)
    if "input_ids" not in takes(cls):
        return _without_text(cls, config)
    text = text_of(config)
    vocab, limit = _vocab(run, base, config), _longest(text) - places(cls, config)
    texts, said = _texts(base, vocab)
    known = _trained_tokens(run, base, vocab, getattr(text, "vocab_size", vocab))
    # Some models take no text of a few tokens.
    groups = [(known[i : i + LENGTH] * LENGTH)[:LENGTH] for i in range(0, len(known), LENGTH)]
    rows = [row[:limit] for row in (*texts, *groups)]
    model = SimpleNamespace(config=config, main_input_name="input_ids")
    count = 1 if texts else ROWS
    ids = verification_batch(model, count, min(LENGTH, limit), vocab=vocab)
    if texts:
        ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    batches = [*_batches(config, rows, vocab), ids]
    trained = [f"{len(known)} trained or new tokens"] if known else []
    asked = [*said, *trained, f"{count} x {ids['input_ids'].shape[1]} random ids"]
    known_lengths = [text, *([] if artifact is None else _own_settings(artifact))]
    length, left = _crossing(known_lengths, cls.__name__, limit, vocab, base)
    if length:
        long = [token for row in rows for token in row] or ids["input_ids"].flatten().tolist()
        repeated = (long * (length // len(long) + 1))[:length]
        batches += _batches(config, [repeated], vocab)
        asked.append(f"one of {length} tokens")
    texts_alone = [{n: v for n, v in each.items() if n in takes(cls)} for each in batches]
    if config.is_encoder_decoder and cls.__name__.endswith("ForSequenceClassification"):
        texts_alone = [_ended(inputs, config.eos_token_id, vocab) for inputs in texts_alone]
    found: Prompts | None = None
    if cls.main_input_name != "input_ids":
        found = _without_text(cls, config)
    parts = ("vision_config", "audio_config")
    more = any(getattr(config, part, None) is not None for part in parts)
    for names in reversed(beside_text(cls, config)):
        here = [f"random {name} beside each" for name in names]
        unseen = ["images and sound: only its text was asked"] if more and not names else []
        batches = [with_others(inputs, names, cls, config) for inputs in texts_alone]
        found = Prompts(batches, (*asked, *here), (*left, *unseen), found)
    assert found is not None
    return found


def _without_text(cls: Any, config: Any) -> Prompts:
    """Prompts for a class that takes no text, but for what its decoder goes on with."""
    model = SimpleNamespace(config=config, main_input_name=cls.main_input_name)
    inputs, names = verification_batch(model), takes(cls)
    generator = torch.Generator().manual_seed(0)
    beside = [n for n in ("decoder_input_values", "speaker_embeddings") if n in names]
    inputs |= {n: random_input(n, config, ROWS, generator) for n in beside}
    if "decoder_input_ids" not in names:
        inputs.pop("decoder_input_ids", None)
    return Prompts([inputs], tuple(f"random {name}" for name in (cls.main_input_name, *beside)))


def verification_batch(
    model: Any, rows: int = ROWS, length: int = LENGTH, seed: int = 0, vocab: int | None = None
) -> Inputs:
    """Random inputs from a fixed seed for `model`, by its `config` and `main_input_name`: token
    ids, the last row padded, decoder inputs for encoder-decoders; pixels, waves or spectra for
    models of images or sound."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name != "input_ids":
        name = model.main_input_name
        inputs = {name: random_input(name, config, rows, generator)}
        text = config.get_text_config(decoder=True)
        if config.is_encoder_decoder and hasattr(text, "vocab_size"):  # one of boxes has none
            inputs["decoder_input_ids"] = _decoder_ids(config, rows, length, generator)
        return inputs
    text = text_of(config)
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


def _decoder_ids(config: Any, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    text = config.get_text_config(decoder=True)
    low, rows = min(5, text.vocab_size - 1), rows * getattr(text, "num_codebooks", 1)
    shape = rows, max(length // 2, 1)
    return torch.randint(low, text.vocab_size, shape, generator=generator)


def _batches(config: Any, rows: list[list[int]], vocab: int) -> Iterator[Inputs]:
    """`rows` in one batch padded on the right, or each in its own where there is no padding."""
    pad = getattr(text_of(config), "pad_token_id", None)
    padded = pad is not None and 0 <= pad < vocab
    for group in [rows] if rows and padded else [[row] for row in rows]:
        longest = max(map(len, group))
        ids = [[*row, *[pad] * (longest - len(row))] for row in group]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in group]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if config.is_encoder_decoder:
            said = (getattr(config, key, None) for key in _DECODER_LENGTHS)
            shortest = min([longest, *(n - 4 for n in said if n)])
            text = config.get_text_config(decoder=True)
            heard = inputs["input_ids"][:, :shortest].remainder(getattr(text, "vocab_size", vocab))
            books = getattr(text, "num_codebooks", 1)
            inputs["decoder_input_ids"] = heard.repeat_interleave(books, 0)
        yield inputs


def _ended(inputs: Inputs, end: int, vocab: int) -> Inputs:
    """Texts whose last token is `end`, and no other: the decoder of a classifier reads them too,
    and is asked there."""
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    other = end + 1 if end + 1 < vocab else end - 1
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == end, other)
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return {**inputs, "input_ids": ids.scatter(1, last, end)}


def _texts(base: BaseModel, vocab: int) -> tuple[list[list[int]], list[str]]:
    """The sentences in the base's tokens, or such of its own words where it does not know them, and
    what they are; none where it has no tokenizer."""
    if not any((base.path / name).is_file() for name in TOKENIZERS):
        return [], []
    try:
        with offline(), panics():
            return _tokenized(base, vocab)
    except Exception:  # of whatever kind: ids need no tokenizer
        return [], []


def _tokenized(base: BaseModel, vocab: int) -> tuple[list[list[int]], list[str]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    rows = [list(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    rows = [row for row in rows if _is_text(row, tokenizer.unk_token_id, vocab)]
    if len(rows) > 1:
        return rows, [f"{len(rows)} texts"]
    own = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    seed = torch.Generator().manual_seed(0)
    picked = torch.randint(len(own), (len(SENTENCES), LENGTH), generator=seed).tolist()
    words = [tokenizer.decode([own[i] for i in row]) for row in picked]
    rows = [list(tokenizer(text)["input_ids"]) for text in words]
    rows = [row for row in rows if _is_text(row, tokenizer.unk_token_id, vocab)]
    return rows, [f"{len(rows)} texts of its tokenizer's words"] if rows else []


def _is_text(row: list[int], unknown: int | None, vocab: int) -> bool:
    """Whether the model has these tokens, and most of them say something."""
    known = all(0 <= token < vocab for token in row)
    return known and sum(token == unknown for token in row) * 2 < len(row)


def _vocab(run: Run, base: BaseModel, config: Any) -> int:
    """The rows of the input embedding, which the run may have resized; where there is none, as in
    CANINE, all characters."""
    size: int = getattr(text_of(config), "vocab_size", sys.maxunicode + 1)
    own = new_embedding(base, run.replaced)
    return size if own is None else own.shape[0]


def _trained_tokens(run: Run, base: BaseModel, vocab: int, size: int) -> list[int]:
    """Some of the tokens whose rows of an embedding the run changed while it left most others as
    they were, which no text would hit; those from `size` to `vocab` are new."""
    found = set(range(size, vocab))
    before = base.tensors.get(input_embedding(base) or "")
    for name in run.embeddings & run.updates.keys():
        if run.shapes[name][0] == vocab:
            found |= _few(_rows_changed(run.take(name), before))
    for name, tensor in run.replaced.items():
        if len(tensor.shape) == 2 and tensor.shape[0] == vocab and before is not None:
            own, old = tensor.load(), base.tensors[base.find(name) or before.name].load()
            if own.shape[1:] == old.shape[1:]:
                rows = min(len(own), len(old))
                found |= _few((own[:rows] != old[:rows].to(own.dtype)).any(dim=1))
    tokens = sorted(found)
    step = max(1, -(-len(tokens) // _TOKENS))
    return tokens[::step]


def _rows_changed(update: Update, before: LazyTensor | None) -> torch.Tensor:
    """Which rows of an embedding `update` changes, `[vocab]`."""
    components = update.components()
    if components is not None:
        return (components.b * components.c).ne(0).any(dim=1)
    old = torch.ones(update.shape)
    if before is not None and before.shape == update.shape:
        old = before.load().float()
    return (update.merge(old.clone(), 0) != old).any(dim=1)


def _few(changed: torch.Tensor) -> set[int]:
    tokens = changed.nonzero().flatten().tolist()
    return set(tokens) if 2 * len(tokens) < len(changed) else set()


def _longest(text: Any) -> int:
    """How many tokens the model has positions for."""
    known = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return 1 << 20
    return max(known - 4, 1)  # RoBERTa's positions begin behind the padding's


def _is_rotary(text: Any) -> bool:
    """Whether positions are computed, all by one formula."""
    return any(getattr(text, key, None) for key in ("rope_parameters", "rope_theta"))


@offline()
def _own_settings(artifact: Path) -> list[Any]:
    """The configuration of the text in `artifact`, which may begin to compute otherwise at a length
    where the base does not; none where it has none, or none that loads."""
    from transformers import AutoConfig

    if not (artifact / "config.json").is_file():
        return []
    try:
        return [text_of(AutoConfig.from_pretrained(artifact, trust_remote_code=False))]
    except Exception:  # of whatever kind: who opens the artifact tells it
        return []


def _crossing(
    settings: Sequence[Any], name: str, limit: int, vocab: int, base: BaseModel
) -> tuple[int, list[str]]:
    """The length of the long prompt, 0 for none, and which lengths it does not cross: those that
    any of `settings` names, of which the first are the base's."""
    weights = sum(numel(tensor) for tensor in base.tensors.values())
    scores = vocab if name.endswith(("LM", "LMHeadModel", "Generation")) else 1
    # Operations of its tokens, bytes of its logits, and of a mask of all its tokens by all.
    dear = int(min(_OPERATIONS / (2 * max(weights, 1)), _NBYTES / (4 * scores), _NBYTES**0.5))
    wanted: dict[tuple[str, int], int] = {}
    for text in settings:
        values = text.to_dict()
        wanted |= {(key, n): min(n + n // 8 + 8, limit) for key, n in _lengths(values)}
        n = getattr(text, "max_position_embeddings", None)
        if "dynamic" in _rope_types(values) and type(n) is int:
            wanted["max_position_embeddings", n] = n + n // 8 + 8
    if limit < 1 << 20 and not _is_rotary(settings[0]):  # every position has numbers of its own
        wanted["max_position_embeddings", limit - 1] = limit
    found, left = 0, []
    for (key, value), length in sorted(wanted.items()):
        if length <= value:
            continue  # the model has no positions beyond it
        if length > dear:
            left.append(f"{key} {value} is not crossed: it would cost too much here")
        else:
            found = max(found, length)
    return (found if found > LENGTH else 0), left


def _lengths(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif key in _LENGTHS:
            for each in value if isinstance(value, list) else [value]:
                if type(each) is int and each > 0:
                    yield key, each


def _rope_types(values: Mapping[str, Any]) -> Iterator[object]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif key in ("rope_type", "type"):
            yield value
