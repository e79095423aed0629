"""Whether an artifact still is what its certificate says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.certificate import (
    FILE,
    SIGNATURE,
    artifact_files,
    file_record,
    fingerprint_of_base,
    read_records,
    unlike,
    write_json,
)
from converters.errors import DoraExportError, MissingError, OutputError, TensorFileError
from converters.files.handles import check_there
from converters.files.json_files import read_json
from converters.files.output import addition
from converters.files.tensors import open_safetensors
from converters.model.base import BaseModel, open_base


@dataclass(frozen=True)
class Difference:
    """Where the artifact or the base differs from the certificate: a file or tensor, and how."""

    where: str
    found: str
    expected: str


@dataclass(frozen=True)
class Check:
    """`files` were compared, `whole` of them by every byte, the others by size and 16 pieces;
    `weights`: base weights compared, None where no base was given."""

    target: str
    files: int
    whole: int
    weights: int | None
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        return not self.differences


def check(artifact: str | Path, base: str | Path | BaseModel | None = None) -> Check:
    """Compare the files of `artifact` with its certificate: names, sizes, hashes, and whether each
    safetensors file is whole. With `base`, compare that with the one it was made from.

    Raises `MissingError` where there is no certificate, `TensorFileError` where it is none.
    """
    folder = Path(artifact)
    path = folder / FILE
    check_there(folder)
    if not path.is_file():
        raise MissingError(
            "no certificate here",
            file=path,
            expected="a folder that dora-export wrote",
        )
    proof = read_json(path)
    records = read_records(proof, path)
    found = [*_compare(folder, records)]
    weights = None
    if base is not None:
        known = fingerprint_of_base(proof)
        if known is None:
            raise TensorFileError(
                "the certificate names no base",
                file=path,
                remedy="leave --base out: the artifact was written without one",
            )
        model = base if isinstance(base, BaseModel) else open_base(base)
        weights = len(known)
        found += _compare_base(model, known)
    whole = sum("sha256" in record for record in records.values())
    return Check(str(proof.get("target")), len(records), whole, weights, tuple(found))


def changed_files(artifact: Path) -> list[str]:
    """The files that the certificate of `artifact` lists and that are gone or no longer as it says;
    none where no certificate lists any."""
    records = records_of(artifact)
    return [each.where for each in _compare(artifact, records) if each.where in records]


def records_of(artifact: Path) -> dict[str, Mapping[str, object]]:
    """What the certificate of `artifact` says of each file; nothing where none lists any."""
    path = artifact / FILE
    try:
        return read_records(read_json(path), path) if path.is_file() else {}
    except DoraExportError:
        return {}


def record(artifact: str | Path) -> None:
    """Put the hash of every byte of every file into the certificate of an artifact that was found
    unchanged, where a merge put those of pieces. Raises `OutputError` where it is signed."""
    folder = Path(artifact)
    if (folder / SIGNATURE).exists():
        raise OutputError(
            "the artifact is signed with its certificate, which would change",
            file=folder / SIGNATURE,
            remedy="remove the signature, record, and sign again",
        )
    files = {name: file_record(path) for name, path in artifact_files(folder).items()}
    with addition(folder) as fresh:
        write_json(fresh / FILE, {**read_json(folder / FILE), "files": files})
        (fresh / FILE).replace(folder / FILE)


def _compare(folder: Path, records: Mapping[str, Mapping[str, object]]) -> Iterator[Difference]:
    present = artifact_files(folder)
    for name in sorted(present.keys() - records.keys()):
        yield Difference(name, "a file", "none of this name")
    for name, known in records.items():
        path = present.get(name)
        if path is None or not path.is_file():
            yield Difference(name, "no file", f"{known.get('bytes')} bytes")
            continue
        if (difference := unlike(path, known)) is not None:
            yield Difference(name, *difference)
        elif path.suffix == ".safetensors":
            try:
                open_safetensors(path)
            except DoraExportError as error:
                yield Difference(name, str(error).partition("\n")[0], "a whole safetensors file")


def _compare_base(base: BaseModel, known: Mapping[str, str]) -> Iterator[Difference]:
    for name in base.unlike(known):
        if name not in base.tensors:
            yield Difference(name, "not in the base", "a base weight")
        elif name not in known:
            yield Difference(name, "a base weight", "none of this name")
        else:
            yield Difference(name, "another base weight", f"fingerprint {known[name]}")
