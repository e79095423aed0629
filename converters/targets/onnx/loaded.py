"""The torch model that a graph is exported from, and what is written beside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import BaseError, TargetError, panics
from ...model.architecture import offline
from ..merged.companions import companions

# Files of which transformers makes a tokenizer.
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "source.spm"),
)


@offline()
def load_model(
    path: Path, architecture: str | None, num_labels: int | None
) -> tuple[Any, list[str]]:
    """The model in float32, and the names of its tensors that the folder does not hold."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if num_labels is not None:
        config.num_labels = num_labels
    name = architecture or (config.architectures or ["AutoModel"])[0]
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, name).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:
        raise TargetError(
            "transformers cannot load this model",
            file=path,
            found=f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}",
        ) from None
    finally:
        transformers.logging.set_verbosity(level)
    known = dict(model.named_parameters())
    return model.eval(), sorted(set(info["missing_keys"]) & known.keys())


def load_whole(path: Path, architecture: str | None = None, unread: tuple[str, ...] = ()) -> Any:
    """The model in float32, in its own class or in `architecture`. Raises `BaseError` when it lacks
    tensors but those that begin as `unread` says."""
    model, missing = load_model(path, architecture, None)
    missing = [name for name in missing if not name.startswith(unread)]
    if missing:
        raise BaseError("the model lacks tensors", file=path, found=", ".join(missing[:8]))
    return model


def write_config(model: Any, out: Path, source: Path, task: str | None = None) -> None:
    write_companions(out, source, task)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)


@offline()
def write_companions(out: Path, source: Path, task: str | None = None) -> None:
    """Put what belongs to the model in `source`, for `task`, into `out`, its tokenizer as
    transformers' class makes it of the files: these may have another form than `tokenizer.json`,
    leave out special tokens, or say what the class does otherwise. Whoever runs a graph has no such
    class."""
    from transformers import AutoTokenizer

    companions(source, task=task).copy(out)
    if not any((source / name).is_file() for name in TOKENIZERS):
        return
    try:
        with panics():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # of whatever kind: whoever reads a text tells it, and ids need none
        return
    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is not None:
        own.save(str(out / "tokenizer.json"))
    (out / "special_tokens_map.json").write_text(json.dumps(tokenizer.special_tokens_map))
