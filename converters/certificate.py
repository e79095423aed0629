"""`dora_export.json`: what went into an artifact, and how exactly it came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from .base import BaseModel
from .run import Run

FILE = "dora_export.json"


def tool() -> str:
    return f"dora-serve {version('dora-serve')}"


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def certificate(
    kind: str,
    run: Run,
    base: BaseModel | None,
    modules: Mapping[str, Mapping[str, object]],
    **details: object,
) -> dict[str, object]:
    """The certificate of one artifact: tool, inputs with hashes, base fingerprint, modules."""
    return {
        "tool": tool(),
        "kind": kind,
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
            "fingerprint": base.fingerprint(run.updates),
        },
        **details,
        "warnings": list(run.warnings),
        "modules": dict(modules),
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
