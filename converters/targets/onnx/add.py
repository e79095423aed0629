"""Adapters added to an ONNX folder that was written with some."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...certificate import FILE, file_record, read_records, unlike, write_json
from ...errors import OutputError
from ...files.json_files import read_json
from ...files.onnx_files import FOLDER, SUFFIX, graphs_in
from ...files.output import addition
from ...model.base import BaseModel
from ...run import Run
from .adapters import write_adapters
from .plan import plan_added
from .report import adapter_certificates


def add_adapters(
    folder: Path, adapters: Mapping[str, Run], base: BaseModel, force: bool, dry_run: bool
) -> dict[str, dict[str, int]]:
    """See `converters.targets.onnx.add_adapters`."""
    if dry_run:
        stripped = plan_added(folder, adapters, base, force=force)
        _check_own(folder, adapters)
        return {n: {m: run.rank(m) or 0 for m in run.updates} for n, run in stripped.items()}
    with addition(folder) as temporary:
        stripped = plan_added(folder, adapters, base, force=force)
        _check_own(folder, adapters)
        proof: dict[str, Any] = read_json(folder / FILE)
        for file in graphs_in(folder):
            shutil.copyfile(file, temporary / file.name)
        ranks = write_adapters(temporary, stripped, base)
        proof["adapters"] |= adapter_certificates(adapters, base, ranks)
        if isinstance(measured := proof.get("accuracy"), dict):  # on the run of that name before
            proof["accuracy"] = {n: each for n, each in measured.items() if n not in adapters}
        added = [Path(FOLDER, f"{name}{SUFFIX}") for name in adapters]
        proof["files"] |= {file.as_posix(): file_record(temporary / file) for file in added}
        write_json(temporary / FILE, proof)
        (folder / FOLDER).mkdir(exist_ok=True)
        for file in (*added, Path(FILE)):
            (temporary / file).replace(folder / file)
    return ranks


def _check_own(folder: Path, names: Iterable[str]) -> None:
    """Raise `OutputError` where the file of an adapter would take the place of one that we did not
    write, or that was changed since, or would lie elsewhere, `TensorFileError` where the
    certificate lists no files."""
    records = read_records(read_json(folder / FILE), folder / FILE)
    if (folder / FOLDER).is_symlink():
        raise OutputError(
            "the adapters' folder is a link, and what is added would lie elsewhere",
            file=folder / FOLDER,
            expected="a folder, as it was written",
            remedy="put the folder itself in the link's place",
        )
    files = [Path(FOLDER, f"{name}{SUFFIX}") for name in names]
    for file in (each for each in files if os.path.lexists(folder / each)):
        place = folder / file
        known = records.get(file.as_posix())
        if known is None or place.is_symlink() or not place.is_file() or unlike(place, known):
            raise OutputError(
                "the adapter's file was not written here, or was changed since",
                file=place,
                expected="none, or one as the certificate says",
                remedy="choose another name, or move away what is there",
            )
