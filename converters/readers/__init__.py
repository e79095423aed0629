"""Readers: one file per training method. A reader registers under `dora_serve.readers`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..errors import MissingError, RunError
from ..files.handles import reading, state_at, there
from ..files.json_files import is_number as is_number
from ..options import ReadOptions as ReadOptions
from ..run import Run
from .registry import Reader as Reader
from .registry import detect as detect
from .registry import is_run as is_run
from .registry import readers as readers
from .run_folder import RunFolder as RunFolder

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def read_run(path: str | Path, options: ReadOptions | None = None) -> Run:
    """Read the run at `path`: a checkpoint folder, the task folder above it, an adapter folder,
    or a hub id that is in the local cache.

    Only tables of contents are read; tensor data follows when it is used.

    Raises `MissingError` where nothing is there, `RunError` where it is no run or less than it
    promises, `TensorFileError` for a damaged file.
    """
    return _read(path, options, named=True)


def read_stored(path: str | Path, options: ReadOptions | None = None) -> Run:
    """As `read_run`, with the modules too that the file holds and its configuration does not name,
    which PEFT leaves out."""
    return _read(path, options, named=False)


def _read(path: str | Path, options: ReadOptions | None, *, named: bool) -> Run:
    folder = folder_of(path)
    options = options or ReadOptions()
    if options.lora_alpha is not None and not is_number(options.lora_alpha):
        raise RunError("lora_alpha is not a finite number", found=options.lora_alpha)
    with reading(folder, RunError):
        before = {file: state_at(file) for file in folder.glob("*")}
        reader, found = detect(folder, options.method)
        run = replace(reader.read(found, options), method=reader.name)
        if options.parts:
            from .parts import read_parts

            run = read_parts(run, options)
        from .promises import checked

        run = replace(checked(run, found, options, named), inputs=(folder, *options.parts))
    if not run.updates and not run.replaced:
        raise RunError("the run adapted nothing", file=run.path)
    # Files that lie elsewhere, or deeper, are only known now.
    states = {file: before[file] if file in before else state_at(file) for file in run.files}
    return replace(run, states=states)


def folder_of(path: str | Path) -> Path:
    """`path` itself, or the folder in the local hub cache of the id that it is."""
    if not str(path):
        raise MissingError("the run's path is empty")
    folder = Path(path)
    if there(folder) or not _HUB_ID.fullmatch(str(path)):
        return folder
    return _cached_run(str(path))


def _cached_run(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:
        raise MissingError(
            "no such run: neither a folder nor in the local hub cache",
            file=name,
            remedy=f"give a folder, or fetch it first: hf download {name}",
        ) from None
