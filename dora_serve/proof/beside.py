"""What lies beside an artifact's weights and decides what is deployed: its tokenizer, and what no
prompt asks, such as the tokens that end an answer, the template of chats, and other weights."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path

from converters.certificate import FILE as CERTIFICATE
from converters.certificate import artifact_files
from converters.errors import panics, some
from converters.files.tensors import same_values
from converters.model.architecture import offline
from converters.model.base import HEAD, BaseModel, open_base
from converters.model.quantized import quantization
from converters.model.tying import tied
from converters.readers.run_folder import CONFIG_FILE
from converters.run import Run
from converters.targets.merged.companions import QUANTIZERS
from converters.targets.merged.settings import unlike

from .check import changed_files, records_of
from .prompts import SENTENCES, TOKENIZERS

# Of the files of a tokenizer those by which transformers knows none.
_MORE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_GENERATION = "generation_config.json"
_ADDED = 256  # the most added tokens that are asked
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_SILENT = {".md", ".png", ".jpg", ".svg", ".html"}  # of what lies there, what no engine reads
_LEGAL = ("LICENSE", "NOTICE", "README")


def files_of(artifact: Path, run: Run, base: BaseModel) -> tuple[list[str], list[str]]:
    """What is wrong with the files beside the weights of `artifact`, and what is other than the
    run or the base has it although no prompt shows it.

    Where a certificate lists the files, it tells which are as they were written; else they are
    compared with the run's, which go before the base's, and the base's.
    """
    known = records_of(artifact)
    own = run.path if (run.path / "tokenizer_config.json").is_file() else None
    fault, differs = _tokenizer(artifact, own or base.path, run.path)
    whose = "base's" if own is None else "run's"
    faults = [] if fault is None else [fault.replace("{whose}", whose)]
    if known:
        return faults, list(_uncertified(artifact, known))
    told = [f"the {some(differs)} are not the {whose}, and no prompt shows it"] if differs else []
    other = (artifact / CONFIG_FILE).is_file() or any(artifact.glob("*.onnx"))
    if (artifact / "config.json").is_file() and not other:
        told += _weights(artifact)
        try:
            told += _settings(artifact, base)
        except Exception as error:  # of whatever kind: others' files
            faults.append(f"{_GENERATION} does not load: {type(error).__name__}: {error}"[:300])
    return faults, told


def _uncertified(artifact: Path, known: Mapping[str, object]) -> Iterator[str]:
    """No prompts ask for every row of an embedding, nor of every graph that lies there."""
    if changed := changed_files(artifact):
        yield (
            f"{some(changed)}: no longer as {CERTIFICATE} says it was written (`check`), and what "
            "these prompts do not ask may be other than it was"
        )
    more = [name for name in artifact_files(artifact) if name not in known and _is_read(name)]
    if more:
        yield (
            f"{some(more)}: lies there since {CERTIFICATE} was written (`check`), and an engine "
            "may read it in the place of what was proved"
        )


def _is_read(name: str) -> bool:
    path = Path(name)
    return path.suffix not in _SILENT and not path.name.upper().startswith(_LEGAL)


def _weights(artifact: Path) -> Iterator[str]:
    """Weights beside those that were read, and what the configuration says of these that they are
    not: quantized, or tied."""
    model = open_base(artifact)
    read = {tensor.path for tensor in model.tensors.values()}
    files = [path for path in sorted(artifact.iterdir()) if path.is_file()]
    more = [path.name for path in files if path.suffix in _WEIGHTS and path not in read]
    if more := [name for name in more if name != "training_args.bin"]:
        yield f"{some(more)}: not read here, and an engine may read it in the place of what was"
    said = [path.name for path in files if path.name in QUANTIZERS]
    if model.stored is None and (said or quantization(model.config)):
        yield (
            f"{some(said or ['config.json'])}: names a quantization that the weights do not have, "
            "which an engine may apply to them"
        )
    if _has_head_left_out(model):
        yield (
            "config.json: says that the head is the embedding (tie_word_embeddings), and the "
            "weights have one of its own, which an engine may leave out"
        )


def _has_head_left_out(model: BaseModel) -> bool:
    """Whether the configuration ties the head to an embedding of other values: transformers 5
    unties such, others take the embedding."""
    head, embedding = model.find(HEAD), model.embedding
    if not head or not embedding or HEAD not in tied(model.config):
        return False
    return not same_values(model.tensors[head], model.tensors[embedding])


@offline()
def _settings(artifact: Path, base: BaseModel) -> list[str]:
    """Values of the configurations that are not the base's."""
    from transformers import AutoConfig, GenerationConfig

    told = []
    configs = [
        AutoConfig.from_pretrained(each, trust_remote_code=False) for each in (artifact, base.path)
    ]
    if configs[0].model_type != configs[1].model_type:  # of the text model alone
        configs = [config.get_text_config() for config in configs]
    if names := unlike(*(config.to_dict() for config in configs)):
        told.append(f"config.json: {some(names)} not the base's, and no prompt shows it")
    folders = (artifact, base.path)
    if any((folder / _GENERATION).is_file() for folder in folders):
        said = [
            GenerationConfig.from_pretrained(folder)
            if (folder / _GENERATION).is_file()
            else GenerationConfig.from_model_config(config)
            for folder, config in zip(folders, configs, strict=True)
        ]
        if names := unlike(*(each.to_dict() for each in said)):
            told.append(f"{_GENERATION}: {some(names)} not the base's, and no prompt shows it")
    return told


@offline()
def _tokenizer(artifact: Path, source: Path, run: Path) -> tuple[str | None, list[str]]:
    """What is wrong with the tokenizer in `artifact`, where it has one: that it does not load, or
    makes other tokens of a text than that of `source`. And what else of it is other."""
    from transformers import AutoTokenizer

    if not _has_tokenizer(artifact) or _same(artifact, source):
        return None, []
    found, words = [], list(SENTENCES)
    for folder in (source, artifact):
        try:
            with panics():
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                if folder is source:
                    words += [str(t) for t in tokenizer.added_tokens_decoder.values()][:_ADDED]
                rows = [list(tokenizer(text)["input_ids"]) for text in words]
                found.append((tokenizer, rows, tokenizer.get_vocab()))
        except Exception as error:
            if folder is source and _has_tokenizer(source):
                return None, []  # the run and the base have one that does not load either
            if folder is source:
                continue
            return f"its tokenizer does not load: {type(error).__name__}: {str(error)[:300]}", []
    if len(found) == 1:
        return None, []
    (theirs, wanted, numbers), (its, rows, own) = found
    if rows != wanted:
        return "its tokenizer makes other tokens of a text than the {whose}", []
    if moved := [word for word, number in numbers.items() if own.get(word) != number]:
        return f"its tokenizer has not the number of the {{whose}} for: {some(moved)!r}", []
    template = theirs.chat_template
    if (run / "chat_template.jinja").is_file():  # trained with it, on the base's tokenizer
        template = (run / "chat_template.jinja").read_text()
    special = dict(theirs.special_tokens_map) != dict(its.special_tokens_map)
    differs = ["special tokens"] if special else []
    return None, [*differs, *(["chat template"] if template != its.chat_template else [])]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _same(artifact: Path, source: Path) -> bool:
    names = [n for n in (*TOKENIZERS, *_MORE) if any((f / n).is_file() for f in (artifact, source))]
    return all(
        all((folder / name).is_file() for folder in (artifact, source))
        and filecmp.cmp(artifact / name, source / name, shallow=False)
        for name in names
    )
