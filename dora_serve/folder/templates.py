"""The chat template that a folder of transformers holds. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import DoraExportError, TensorFileError
from converters.files.handles import check_file
from converters.files.json_files import read_json

if TYPE_CHECKING:
    from converters.model.base import BaseModel
    from converters.run import Run

_LONGEST = 1 << 20  # bytes


def chat_template(folder: Path) -> str | None:
    """The text of `chat_template.jinja`, else what `tokenizer_config.json` has, of several the one
    that is called default; None where there is none. Raises `TensorFileError` naming the file when
    it cannot be read."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        return read_template(file) or None
    text: Any = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(text, list):
        parts = [each for each in text if isinstance(each, dict)]
        text = {each.get("name"): each.get("template") for each in parts}.get("default")
    return text if isinstance(text, str) and text else None


def has_template(folder: Path) -> bool:
    """Whether a chat is a prompt for the model in `folder`, as far as its files' names tell."""
    try:
        return chat_template(folder) is not None
    except DoraExportError:
        return True  # which tells whoever asks for a chat


def read_template(file: Path) -> str:
    """Raises `TensorFileError` when it is no file of text, or longer than 1 MB."""
    if check_file(file) > _LONGEST:
        raise TensorFileError("too long for a chat template", file=file, expected="at most 1 MB")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TensorFileError(f"no chat template: {error}", file=file) from None


def unused_template(run: Run, base: BaseModel) -> str | None:
    """What is to be said of a run with a template of its own where `base`'s is used: engines have
    one for a base and all that is served with it, as vLLM has."""
    try:
        own = chat_template(run.path)
        if own is None or own == chat_template(base.path):
            return None
    except DoraExportError:
        return None  # of the base it is told elsewhere, and of the run it is not used
    return (
        f"its own chat template is not used, that of {base.name} is: --chat-template gives "
        "another, and merged it has its own"
    )
