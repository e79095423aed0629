"""`dora_export.json`: what went into an artifact, and how exactly it came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .model.base import BaseModel
from .run import Run

FILE = "dora_export.json"
SIGNATURE = "model.sig"  # signs the files and the certificate, so that neither can list it
_PIECES, _PIECE = 16, 1 << 20
_LARGE = 4 * _PIECES * _PIECE


def tool() -> str:
    return f"dora-serve {version('dora-serve')}"


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def certificate(
    target: str,
    run: Run,
    base: BaseModel | None,
    modules: Mapping[str, Mapping[str, object]],
    **details: object,
) -> dict[str, object]:
    """The certificate of one artifact: tool, inputs with hashes, modules, and of the
    base its whole fingerprint, see `BaseModel.fingerprint`."""
    return {
        "tool": tool(),
        "target": target,
        "run": {
            "path": run.path.name,
            "method": run.method,
            "finished": run.finished,
            "task": run.task,
            "options": dict(run.options),
            "files": [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in run.files
            ],
        },
        "base": None
        if base is None
        else {
            "name": base.name
            if "/" not in base.name or not base.path.is_absolute()
            else Path(base.name).name,
            "fingerprint": base.fingerprint,
        },
        **({} if run.fit is None else {"fit": asdict(run.fit)}),
        **details,
        "warnings": list(run.warnings),
        "modules": dict(modules),
    }


def pieces_sha256(path: Path) -> str:
    """SHA-256 of 16 evenly spaced pieces of a large file, one MiB each, both ends included."""
    digest = hashlib.sha256()
    last = path.stat().st_size - _PIECE
    with path.open("rb") as stream:
        for number in range(_PIECES):
            stream.seek(max(0, last) * number // (_PIECES - 1))
            digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def file_record(path: Path, pieces: bool = False) -> dict[str, object]:
    """Size and hash of a file: of the whole, or where `pieces` will do, of parts if it is large."""
    size = path.stat().st_size
    if pieces and size > _LARGE:
        return {"bytes": size, "pieces": pieces_sha256(path)}
    return {"bytes": size, "sha256": sha256(path)}


def artifact_files(folder: Path) -> dict[str, Path]:
    """The files of an artifact by their paths in it: no certificate, no signature, none hidden."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if name.as_posix() not in (FILE, SIGNATURE) and not path.is_dir() and not _hidden(name)
    }


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def write_certificate(folder: Path, proof: dict[str, object], pieces: bool = False) -> None:
    """Write `proof` with the sizes and hashes of all files now in `folder`, see `file_record`."""
    files = {name: file_record(path, pieces) for name, path in artifact_files(folder).items()}
    write_json(folder / FILE, {**proof, "files": files})


def write_json(path: Path, value: object) -> None:
    # A folder's name may be bytes that are no text; they are shown as question marks.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")
