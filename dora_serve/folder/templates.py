"""The chat template that a folder of transformers holds. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import DoraExportError, TensorFileError
from converters.files.handles import check_file, reading
from converters.files.json_files import read_json

DEFAULT, WITH_TOOLS = "default", "tool_use"  # as transformers names those of a model
_LONGEST = 1 << 20  # bytes


def chat_template(folder: Path) -> str | None:
    """The text of the template that is taken where a request has no tools; None where there is
    none. Raises `TensorFileError` naming the file when it cannot be read."""
    return chat_templates(folder).get(DEFAULT)


def chat_templates(folder: Path) -> dict[str, str]:
    """The texts of `DEFAULT` and of `WITH_TOOLS`, as far as there are any: those in files of their
    own, else what `tokenizer_config.json` has. Raises as `chat_template`."""
    files = {
        DEFAULT: folder / "chat_template.jinja",
        WITH_TOOLS: folder / "additional_chat_templates" / f"{WITH_TOOLS}.jinja",
    }
    with reading(folder, TensorFileError):
        there: dict[str, Any] = {
            n: read_template(file) for n, file in files.items() if file.exists()
        }
        config = folder / "tokenizer_config.json"
        if not there and config.exists():
            said: Any = read_json(config).get("chat_template")
            several = said if isinstance(said, list) else [{"name": DEFAULT, "template": said}]
            there = {str(p.get("name")): p.get("template") for p in several if isinstance(p, dict)}
    return {name: there[name] for name in files if isinstance(there.get(name), str) and there[name]}


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
