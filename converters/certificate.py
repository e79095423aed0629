"""`dora_export.json`: what went into an artifact, and how exactly it came out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DoraExportError, RunError, TensorFileError
from .files.handles import paths_below
from .files.hashes import HASHING
from .files.json_files import read_json
from .model.base import BaseModel
from .progress import shown
from .run import Run

FILE = "dora_export.json"
SIGNATURE = "model.sig"  # signs the files and the certificate, so that neither can list it
_PIECES, _PIECE = 16, 1 << 20
_LARGE = 4 * _PIECES * _PIECE
_TOOL = "dora-serve"


def tool() -> str:
    return f"{_TOOL} {version(_TOOL)}"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream, shown(path.stat().st_size, HASHING) as advance:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def certificate(
    target: str,
    run: Run,
    base: BaseModel | None,
    modules: Mapping[str, Mapping[str, object]],
    **details: object,
) -> dict[str, object]:
    """The certificate of one artifact: tool, inputs with hashes, modules, and of the
    base its whole fingerprint, see `BaseModel.fingerprint`. Raises `RunError` when a file of the
    run is another than was read: what it says is not read again, as its numbers are."""
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in run.files
    ]
    if run.changed:
        raise RunError(
            "the run changed while it was read",
            file=run.path,
            remedy="run again when nothing writes to it",
        )
    return {
        "tool": tool(),
        "target": target,
        "run": {
            "path": run.path.name,
            "method": run.method,
            "finished": run.finished,
            "task": run.task,
            "options": dict(run.options),
            "files": files,
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
    """The files of an artifact by their paths in it: no certificate, no signature, none hidden.
    Raises `TensorFileError` where a folder cannot be listed, in which there may be some."""
    names = {path.relative_to(folder): path for path in paths_below(folder)}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if name.as_posix() not in (FILE, SIGNATURE)
        and (path.is_symlink() or not path.is_dir())  # a link to a folder brings its files
        and not any(part.startswith(".") for part in name.parts)
    }


def write_certificate(folder: Path, proof: dict[str, object], pieces: bool = False) -> None:
    """Write `proof` with the sizes and hashes of all files now in `folder`, see `file_record`."""
    files = {name: file_record(path, pieces) for name, path in artifact_files(folder).items()}
    write_json(folder / FILE, {**proof, "files": files})


def read_records(proof: Mapping[str, object], path: Path) -> dict[str, Mapping[str, object]]:
    """What the certificate `proof`, read from `path`, says of each file of its artifact. Raises
    `TensorFileError` where it says nothing, or names a file elsewhere."""
    files = proof.get("files")
    if not isinstance(files, dict) or not all(isinstance(r, dict) for r in files.values()):
        raise TensorFileError(
            "the certificate does not list the artifact's files",
            file=path,
            found=str(files)[:200],
            expected="files: {name: {bytes, sha256}}",
            remedy="write the artifact anew",
        )
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise TensorFileError("the certificate names a file elsewhere", file=path, found=name)
    return files


def fingerprint_of_base(proof: Mapping[str, object]) -> dict[str, str] | None:
    """The fingerprint of the base that a certificate names; None where it names none."""
    base = proof.get("base")
    known = base.get("fingerprint") if isinstance(base, dict) else None
    return known if isinstance(known, dict) else None


def unlike(path: Path, known: Mapping[str, object]) -> tuple[str, str] | None:
    """What was found of the file `path` and what its record has in its place; None where they are
    the same."""
    size = path.stat().st_size
    if size != known.get("bytes"):
        return f"{size} bytes", f"{known.get('bytes')} bytes"
    kind, hashed = ("sha256", sha256) if "sha256" in known else ("pieces", pieces_sha256)
    value = hashed(path)
    return None if value == known.get(kind) else (f"{kind} {value}", str(known.get(kind)))


def strangers(folder: Path) -> list[str]:
    """What in `folder` is nothing that we wrote: all of it where there is no certificate, else each
    file that the certificate does not name, or that is not as it says."""
    try:
        proof = read_json(folder / FILE)
        records = read_records(proof, folder / FILE)
    except DoraExportError:
        return sorted(os.listdir(folder))
    if not str(proof.get("tool")).startswith(f"{_TOOL} "):
        return sorted(os.listdir(folder))
    return [
        name.as_posix()
        for path in sorted(folder.rglob("*"))
        if (name := path.relative_to(folder)).as_posix() != FILE
        and not (name.as_posix() == SIGNATURE and is_signature(path))
        and not (path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK))
        and not (
            (known := records.get(name.as_posix())) is not None
            and path.is_file()
            and not path.is_symlink()
            and unlike(path, known) is None
        )
    ]


def is_signature(path: Path) -> bool:
    """Whether it signs a certificate, as `sign` and model_signing write it, and not whose it is."""
    try:
        bundle: Any = read_json(path)
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        signed = [each["name"] for each in statement["predicate"]["resources"]]
    except (DoraExportError, ValueError, TypeError, LookupError, RecursionError):
        return False
    return FILE in signed and not path.is_symlink()


def write_json(path: Path, value: object) -> None:
    # A folder's name may be bytes that are no text; they are shown as question marks.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")
