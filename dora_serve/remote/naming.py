"""URLs in the place of the local copies' paths: in what is printed, raised and written."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from converters.errors import DoraExportError

_TELLING = ("README.md", "adapter_config.json", "dora_export.json")


class Printed(io.StringIO):
    """What is printed to `stream`, with `names` for local paths; kept until `release` where it is
    `held`."""

    def __init__(self, names: Mapping[str, str], held: bool, stream: TextIO) -> None:
        super().__init__()
        self._names, self._held, self._stream = names, held, stream

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        super().write(text)
        if not self._held:
            self.release()
        return len(text)

    def release(self) -> None:
        self._stream.write(_named(self.getvalue(), self._names))
        self._stream.flush()
        self.seek(0)
        self.truncate()


@contextmanager
def named_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Put `names` for local paths into what a `DoraExportError` says."""
    try:
        yield
    except DoraExportError as error:
        for field, value in vars(error).items():
            if value is not None:
                text = _named(str(value), names)
                setattr(error, field, Exception(text) if isinstance(value, Exception) else text)
        raise


def name_in_files(folder: Path, names: Mapping[str, str]) -> None:
    """Put `names` for local paths into what an artifact says of itself."""
    from converters.certificate import FILE, file_record, write_json
    from converters.files.json_files import read_json

    changed = []
    for path in folder.rglob("*"):
        if path.name in _TELLING:
            text = path.read_text(encoding="utf-8")
            if (named := _named(text, names)) != text:
                path.write_text(named, encoding="utf-8")
                changed.append(path.relative_to(folder).as_posix())
    if changed and (folder / FILE).is_file():
        proof = dict(read_json(folder / FILE))
        if isinstance(records := proof.get("files"), dict):
            for name in records.keys() & {*changed}:
                records[name] = file_record(folder / name)
            write_json(folder / FILE, proof)


def _named(text: str, names: Mapping[str, str]) -> str:
    in_json = text.lstrip().startswith("{")
    for path, url in names.items():
        if in_json:
            for ascii_only in (False, True):
                written = json.dumps(path, ensure_ascii=ascii_only)[1:-1]
                text = text.replace(written, json.dumps(url, ensure_ascii=False)[1:-1])
        else:
            text = text.replace(path, url)
    return text
